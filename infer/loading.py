"""From a name to the parts of a pipeline: a shipped model (`toybox`), a saved folder, or a hub id.

Two layouts are understood, both here and on the hub: trained parts over a base (`subject_model.json`, see
`model/saving.py`) and a full diffusers folder with `adapter/` and `image_encoder/`. Weights are read from safetensors.
Names are looked up in `model/base_loading.py`; here their errors become a user's mistake.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextModel
from transformers.utils import logging as transformers_logging

from data_pipeline.errors import UserError
from model import base_loading
from model.saving import MANIFEST, load_subject_model

SHIPPED, HUB_TIMEOUT_S = base_loading.SHIPPED, base_loading.HUB_TIMEOUT_S
INDEX = "model_index.json"


def one_line_errors(subject: str) -> AbstractContextManager[None]:
    """Tell loading errors of the libraries as a `UserError` of one line that begins with `subject`."""
    return base_loading.one_line_errors(subject, UserError)


def locate_model(name: str | Path) -> Path | str:
    """The folder of a subject model, or its hub id where diffusers is to fetch a full folder.

    Raises:
        UserError: nothing of that name, or a folder that is no subject model.
    """
    with one_line_errors(f"model {name}"):
        place = base_loading.locate(name, "subject")
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
    """As `model.base_loading.load_base`.

    Raises:
        UserError: it cannot be found or read.
    """
    with one_line_errors(f"base {name}"):
        return base_loading.load_base(name, dtype)


def load_base_networks(base: str, dtype: torch.dtype) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """As `model.base_loading.load_base_networks`.

    Raises:
        UserError: it cannot be found or read.
    """
    with one_line_errors(f"base {base}"):
        return base_loading.load_base_networks(base, dtype)


def hush_libraries() -> None:
    """Keep loading bars and warnings of diffusers and transformers off the terminal; the denoising bar stays."""
    for logging in (diffusers_logging, transformers_logging):
        logging.disable_progress_bar()
        logging.set_verbosity_error()
