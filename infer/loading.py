"""From a name to the parts of a pipeline: a shipped model (`toybox`), a saved folder, or a hub id.

Two layouts are understood, both here and on the hub: trained parts over a base (`subject_model.json`, see
`model/saving.py`) and a full diffusers folder with `adapter/` and `image_encoder/`. Weights are read from safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from data_pipeline.errors import UserError
from model.saving import MANIFEST, load_subject_model

SHIPPED = Path(__file__).resolve().parent.parent / "model" / "weights"  # NAME/base and NAME/subject below it
INDEX = "model_index.json"
HUB_TIMEOUT_S = 10


def locate_model(name: str | Path) -> Path | str:
    """The folder of a subject model, or its hub id where diffusers is to fetch a full folder.

    Raises:
        UserError: nothing of that name, or a folder that is no subject model.
    """
    place = _locate(name, "subject")
    if isinstance(place, Path) and not (place / MANIFEST).exists():
        if not (place / INDEX).exists():
            raise UserError(f"model {place}: is no model; expected {MANIFEST} or {INDEX} in that folder")
        if "adapter" not in json.loads((place / INDEX).read_text()):
            raise UserError(f"model {place}: is a plain base without subject adapter; give a subject model")
    return place


def load_trained_parts(folder: Path, base: str | None, dtype: torch.dtype) -> dict[str, Any]:
    """Components of trained parts over their base (or over `base`, whose shapes must fit), as keyword arguments.

    Raises:
        UserError: incomplete, or another base than the one it was trained on.
    """
    with one_line_errors(f"model {folder}"):
        parts = load_subject_model(folder, base=base)
    stock = load_base(parts.base, dtype=None)
    with one_line_errors(f"model {folder}"):
        parts.compose(stock.unet, stock.text_encoder)  # before the cast: the fingerprint is that of the files
    networks = {
        "vae": stock.vae,
        "text_encoder": stock.text_encoder,
        "unet": stock.unet,
        "adapter": parts.adapter,
        "image_encoder": parts.image_encoder,
    }
    for network in networks.values():
        network.eval().requires_grad_(False).to(dtype)
    return {**networks, "tokenizer": stock.tokenizer, "scheduler": stock.scheduler, "base": parts.base}


def load_base(name: str | Path, dtype: torch.dtype | None = torch.float32) -> StableDiffusionPipeline:
    """A plain base as diffusers' own pipeline: a shipped name (`toybox`), a folder or a hub id.

    Args:
        name: what to load.
        dtype: of all its networks; None leaves it to the libraries, which differ.
    Raises:
        UserError: it cannot be found or read.
    """
    with one_line_errors(f"base {name}"):
        return StableDiffusionPipeline.from_pretrained(
            _locate(name, "base"),
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
            use_safetensors=True,
            **({} if dtype is None else {"dtype": dtype}),
        )


def load_base_networks(base: str, dtype: torch.dtype) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """UNet and text encoder of the plain base.

    Raises:
        UserError: it cannot be found or read.
    """
    place = _locate(base, "base")
    with one_line_errors(f"base {base}"):
        unet = UNet2DConditionModel.from_pretrained(place, subfolder="unet", use_safetensors=True)
        text_encoder = CLIPTextModel.from_pretrained(place, subfolder="text_encoder", use_safetensors=True)
    return unet.to(dtype).eval(), text_encoder.to(dtype).eval()


def hush_libraries() -> None:
    """Keep loading bars and warnings of diffusers and transformers off the terminal; the denoising bar stays."""
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()


@contextmanager
def one_line_errors(subject: str) -> Iterator[None]:
    """Tell loading errors of the libraries in one line that begins with `subject`."""
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            reason if reason.startswith(subject) else f"{subject}: cannot be loaded ({reason[:240]})"
        ) from error


def _locate(name: str | Path, part: str) -> Path | str:
    """Folder, shipped folder, or the hub id of a full folder that can be reached."""
    what = "base" if part == "base" else "model"
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    shipped = SHIPPED / str(name) / part
    if re.fullmatch(r"[\w-]+", str(name)) and shipped.is_dir():
        return shipped
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        return _from_hub(str(name))
    names = sorted(entry.name for entry in SHIPPED.iterdir()) if SHIPPED.is_dir() else []
    raise UserError(
        f"{what} {name}: no such folder, shipped model or hub id; shipped: {', '.join(names) or 'none'}, "
        "a hub id looks like owner/name"
    )


def _from_hub(name: str) -> Path | str:
    """Trained parts are fetched now; a full folder is left to diffusers, which fetches only what it needs."""
    try:
        files = {file.rfilename for file in HfApi().model_info(name, timeout=HUB_TIMEOUT_S).siblings or ()}
        if MANIFEST in files:
            return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.md"]))
        return name
    except (HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"model {name}: not to be had from the hub ({reason}); check the id and your login") from error
    except Exception as error:  # the hub's client lets its transport's own errors through
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except OSError:
            raise UserError(
                f"model {name}: no such folder, and the hub cannot be reached ({' '.join(str(error).split())[:120]}); "
                "give a folder, or connect and try again"
            ) from error
