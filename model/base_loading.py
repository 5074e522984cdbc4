"""From a name to a plain base or to the place of a model: a shipped name (`toybox`), a folder, or a hub id.

Bases are stock Stable Diffusion folders, loaded with diffusers' own `from_pretrained` from safetensors; the trainer
starts from them and the pipeline draws with them. Every failure is one line that names what was asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import CLIPTextModel

from model.image_encoder import HUB_TIMEOUT_S
from model.saving import MANIFEST

SHIPPED = Path(__file__).resolve().parent / "weights"  # NAME/base and NAME/subject below it

Part = Literal["base", "subject"]


class ModelLoadingError(ValueError):
    """A model that cannot be found or read, told in one line."""


def load_base(name: str | Path, dtype: torch.dtype | None = torch.float32) -> StableDiffusionPipeline:
    """A plain base as diffusers' own pipeline.

    Args:
        name: shipped name, folder or hub id.
        dtype: of all its networks; None leaves it to the libraries, which differ.
    Raises:
        ModelLoadingError: it cannot be found or read.
    """
    with one_line_errors(f"base {name}"):
        return StableDiffusionPipeline.from_pretrained(
            locate(name, "base"),
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
            use_safetensors=True,
            **({} if dtype is None else {"dtype": dtype}),
        )


def load_base_networks(name: str | Path, dtype: torch.dtype) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """UNet and text encoder of a plain base.

    Raises:
        ModelLoadingError: it cannot be found or read.
    """
    with one_line_errors(f"base {name}"):
        place = locate(name, "base")
        unet = UNet2DConditionModel.from_pretrained(place, subfolder="unet", use_safetensors=True)
        text_encoder = CLIPTextModel.from_pretrained(place, subfolder="text_encoder", use_safetensors=True)
    return unet.to(dtype).eval(), text_encoder.to(dtype).eval()


def locate(name: str | Path, part: Part) -> Path | str:
    """Folder, shipped folder, or the hub id of a full folder that can be reached; the base of trained parts is theirs.

    Raises:
        ModelLoadingError: nothing of that name.
    """
    what = _what(part)
    folder = Path(name).expanduser()
    if folder.is_dir() and part == "base" and (folder / MANIFEST).exists():
        return locate(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["base"], part)
    if folder.is_dir():
        return folder
    shipped = SHIPPED / str(name) / part
    if re.fullmatch(r"[\w-]+", str(name)) and shipped.is_dir():
        return shipped
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        return _from_hub(str(name), what)
    names = sorted(entry.name for entry in SHIPPED.iterdir()) if SHIPPED.is_dir() else []
    raise ModelLoadingError(
        f"{what} {name}: no such folder, shipped model or hub id; shipped: {', '.join(names) or 'none'}, "
        "a hub id looks like owner/name"
    )


@contextmanager
def one_line_errors(subject: str, error_class: type[Exception] = ModelLoadingError) -> Iterator[None]:
    """Tell loading errors of the libraries in one line that begins with `subject`.

    Args:
        subject: what is loaded; an error that already begins with it is passed on as it reads.
        error_class: what is raised; commands give their own class of user's mistakes.
    """
    try:
        yield
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())
        told = isinstance(error, ModelLoadingError) or reason.startswith(subject)
        raise error_class(reason if told else f"{subject}: cannot be loaded ({reason[:240]})") from error


def _what(part: Part) -> str:
    return "base" if part == "base" else "model"


def _from_hub(name: str, what: str) -> Path | str:
    """Trained parts are fetched now; a full folder is left to diffusers, which fetches only what it needs."""
    try:
        files = {file.rfilename for file in HfApi().model_info(name, timeout=HUB_TIMEOUT_S).siblings or ()}
        if MANIFEST in files:
            return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.md"]))
        return name
    except (HfHubHTTPError, HFValidationError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelLoadingError(
            f"{what} {name}: not to be had from the hub ({reason}); check the id and your login"
        ) from error
    except Exception as error:  # the hub's client lets its transport's own errors through
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except OSError:
            raise ModelLoadingError(
                f"{what} {name}: no such folder, and the hub cannot be reached ({' '.join(str(error).split())[:120]}); "
                "give a folder, or connect and try again"
            ) from error
