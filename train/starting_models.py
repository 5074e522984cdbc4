"""What the diffusion tasks start from: a plain base with its noise schedule, and the frozen image tower of references.

Each is a run's export, a folder, or what the model file names: a shipped base, a hub id, a published CLIP.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from data_pipeline.errors import UserError
from model.base_loading import load_base, one_line_errors
from model.image_encoder import SubjectImageEncoder
from model.open_clip_conversion import OPEN_CLIP_CONFIG, load_open_clip
from train.inputs_folder import exported, input_folder
from train.settings import ModelSettings, TrainSettings


@dataclass(frozen=True)
class StartingBase:
    """A plain text-to-image model, as its folder holds it."""

    name: str  # under which a model trained on it will look for it
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    vae: AutoencoderKL
    scheduler: Any  # any diffusers scheduler


def starting_base(settings: TrainSettings, sizes: ModelSettings) -> StartingBase:
    """The base of `inputs.base`, or else of the model file, in float32.

    An earlier run's export goes by the model file's name of the base: that is what it will be shipped as.

    Raises:
        UserError: it cannot be found or read.
    """
    given = settings.inputs.get("base")
    if given is None:
        name, place, asked = sizes.base, sizes.base, f"base: {sizes.base} in {settings.model}"
    elif exported(settings, given).is_dir():
        name, place, asked = sizes.base, str(exported(settings, given)), f"inputs.base={given}"
    else:
        folder = Path(given).expanduser()
        name = place = str(folder.resolve()) if folder.is_dir() else given
        asked = f"inputs.base={given}: no run's export in {exported(settings, given)}"
    try:
        with one_line_errors(f"base {place}"):
            stock = load_base(place)
    except ValueError as error:
        raise UserError(f"{asked}; {error}") from error
    return StartingBase(name, stock.unet, stock.text_encoder, stock.tokenizer, stock.vae, stock.scheduler)


def noise_schedule(scheduler: Any) -> DDPMScheduler:
    """The noise levels and the prediction type of a base, whatever sampler its folder names.

    Samplers lack some of what training needs (PNDM has no velocity); DDPM has it all, from the same configuration.

    Raises:
        UserError: a scheduler of another kind of model (flow matching).
    """
    if "beta_schedule" not in scheduler.config:
        raise UserError(
            f"scheduler {type(scheduler).__name__}: has no beta schedule; give a base of Stable Diffusion 1.x or 2.x"
        )
    return DDPMScheduler.from_config(scheduler.config)


def image_tower(settings: TrainSettings, sizes: ModelSettings) -> SubjectImageEncoder:
    """The frozen image encoder: `inputs.clip` (an open_clip folder or a saved image encoder), that of the subject model
    which is gone on from, or the model file's.

    Raises:
        UserError: none is named, or it cannot be found or read.
    """
    if "clip" in settings.inputs:
        folder = input_folder(settings, "clip")
        with one_line_errors(f"inputs.clip={settings.inputs['clip']}", UserError):
            if not (folder / OPEN_CLIP_CONFIG).exists():
                return SubjectImageEncoder.from_pretrained(folder, use_safetensors=True)
            clip, config = load_open_clip(folder)
            pixels = config["preprocess_cfg"]
            return SubjectImageEncoder.from_open_clip(clip, config["model_cfg"], pixels["mean"], pixels["std"])
    if "subject" in settings.inputs:
        with one_line_errors(f"inputs.subject={settings.inputs['subject']}", UserError):
            folder = input_folder(settings, "subject") / "image_encoder"
            return SubjectImageEncoder.from_pretrained(folder, use_safetensors=True)
    if sizes.image_encoder is None:
        raise UserError(
            f"inputs.clip: task {settings.task} needs an image encoder; give a run's name or a folder, "
            f"or name one in {settings.model} (image_encoder: {{name: ViT-H-14, pretrained: laion2b_s32b_b79k}})"
        )
    if set(sizes.image_encoder) != {"name", "pretrained"}:
        raise UserError(f"{settings.model}: image_encoder={sizes.image_encoder}: expected the keys name and pretrained")
    name, pretrained = sizes.image_encoder["name"], sizes.image_encoder["pretrained"]
    try:
        return SubjectImageEncoder.from_pretrained_open_clip(name, pretrained)
    except Exception as error:  # open_clip lets through what the hub's client and its transport raise
        reason = " ".join(str(error).split())[:240]
        raise UserError(
            f"image_encoder {name} {pretrained}: cannot be loaded ({reason}); "
            "it is read from open_clip's cache or the hub: connect, or give a folder as inputs.clip"
        ) from error
