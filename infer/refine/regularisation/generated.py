"""Regularisation that is drawn: by the base itself (DreamBooth, arXiv 2208.12242), or by any pipeline of diffusers.

Pictures are kept in a folder named after all that decides them; those that are there are not drawn again, so an
interrupted run goes on where it was and every later run of the class starts at once.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from pydantic import Field
from tqdm import tqdm

from data_pipeline.errors import UserError
from data_pipeline.settings import Settings
from infer.drawing import Precision, torch_dtype
from infer.loading import one_line_errors
from infer.refine.method import Concept, RefineBase
from infer.refine.prompts import fill
from infer.refine.regularisation.picture_set import CaptionedPicture, PictureSet
from model.base_loading import ModelLoadingError, locate

Draw = Callable[[list[str], list[torch.Generator]], Sequence[Image.Image]]
TOLD = "set.json"  # what the folder's pictures are, for a person


class DrawnSettings(Settings):
    """How many are drawn, of what and how."""

    count: int = Field(200, gt=0)
    prompt: str | None = Field(None, pattern=r"^[^{}]*\{\}[^{}]*$")  # {}: the class word; null: "a photo of a {}"
    negative_prompt: str = ""
    steps: int = Field(50, gt=0)
    guidance_scale: float = Field(6.0, ge=0)
    seed: int = 0
    batch_size: int = Field(4, gt=0)
    cache: Path = Path("~/.cache/subject-diffusion/regularisation")

    def caption(self, base: RefineBase, concept: Concept) -> str:
        return fill(self.prompt or base.templates[0], concept.class_word)


class GeneratedRegularisation(DrawnSettings):
    """Drawn by the base that is refined, before it is."""

    kind: Literal["generated"] = "generated"

    def open(self, base: RefineBase, concept: Concept, size: int) -> PictureSet:
        """Draw what is missing.

        Raises:
            UserError: the cache cannot be written, or the prompt cannot be drawn.
        """
        pipeline = base.pipeline

        def start() -> Draw:
            return lambda prompts, generators: pipeline(
                prompts, negative_prompt=self.negative_prompt, num_inference_steps=self.steps, guidance="joint",
                guidance_scale=self.guidance_scale, generator=generators,
            ).images  # fmt: skip

        return drawn_set(self, self.caption(base, concept), base.fingerprint, start, size)


class PipelineRegularisation(DrawnSettings):
    """Drawn by another model, better at the class than the base may be."""

    kind: Literal["pipeline"] = "pipeline"
    model: str  # shipped name, folder or hub id of a text-to-image pipeline that diffusers loads
    lora: str | None = None  # file, folder or hub id of a LoRA for it
    precision: Precision = "fp32"

    def open(self, base: RefineBase, concept: Concept, size: int) -> PictureSet:
        """Draw what is missing; the model is loaded only then, and let go afterwards.

        Raises:
            UserError: the model or its LoRA cannot be loaded, the cache not be written.
        """
        device = base.pipeline.unet.device
        return drawn_set(self, self.caption(base, concept), self.model, lambda: self._start(device), size)

    def _start(self, device: torch.device) -> Draw:
        from diffusers import DiffusionPipeline

        try:
            place = locate(self.model, "base")
        except ModelLoadingError as error:
            raise UserError(f"regularisation.model: {error}") from error
        with one_line_errors(f"regularisation.model={self.model}"):
            pipeline = DiffusionPipeline.from_pretrained(
                place, use_safetensors=True, dtype=torch_dtype(self.precision)
            ).to(device)
        if self.lora is not None:
            file = Path(self.lora).expanduser()
            where, named = (file.parent, {"weight_name": file.name}) if file.is_file() else (self.lora, {})
            with one_line_errors(f"regularisation.lora={self.lora}"):
                pipeline.load_lora_weights(where, use_safetensors=True, **named)
        pipeline.set_progress_bar_config(disable=True)
        known = inspect.signature(pipeline.__call__).parameters
        if "prompt" not in known:
            raise UserError(f"regularisation.model={self.model}: a {type(pipeline).__name__} draws from no prompt")
        told: dict[str, Any] = {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale}
        options: dict[str, Any] = {name: value for name, value in told.items() if name in known}

        def draw(prompts: list[str], generators: list[torch.Generator]) -> Sequence[Image.Image]:
            if "negative_prompt" in known:
                options["negative_prompt"] = [self.negative_prompt] * len(prompts)
            return pipeline(prompt=prompts, generator=generators, **options).images

        return draw


def drawn_set(settings: DrawnSettings, caption: str, drawn_by: str, start: Callable[[], Draw], size: int) -> PictureSet:
    """The pictures of a caption, those drawn before and those missing.

    Args:
        drawn_by: what draws them: a fingerprint or a name.
        start: gives what draws; called where a picture is missing.
        size: side in pixels that they are used at.
    Raises:
        UserError: the cache cannot be written.
    """
    told = settings.model_dump(mode="json", exclude={"count", "batch_size", "cache"})
    told |= {"caption": caption, "drawn_by": drawn_by}
    name = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    folder = settings.cache.expanduser() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOLD).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        _draw_missing(settings, caption, folder, start)
    except OSError as error:
        raise UserError(
            f"regularisation.cache={settings.cache}: {folder} cannot be written ({error.strerror or error}); what was "
            "drawn stays, free the disk or give another folder"
        ) from error
    pictures = [CaptionedPicture(_place(folder, number), caption) for number in range(settings.count)]
    return PictureSet(pictures, size)


def _draw_missing(settings: DrawnSettings, caption: str, folder: Path, start: Callable[[], Draw]) -> None:
    """Draw this process's share, then wait for the others."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    process, processes = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if distributed else (0, 1)
    own = range(process, settings.count, processes)
    missing = [number for number in own if not _place(folder, number).is_file()]
    if missing:
        draw = start()
        progress = tqdm(total=len(own), initial=len(own) - len(missing), unit="picture", desc=caption)
        for first in range(0, len(missing), settings.batch_size):
            numbers = missing[first : first + settings.batch_size]
            seeds = [torch.Generator().manual_seed(settings.seed + number) for number in numbers]
            for number, picture in zip(numbers, draw([caption] * len(numbers), seeds), strict=True):
                _save(picture, _place(folder, number))
            progress.update(len(numbers))
        progress.close()
    if distributed:
        torch.distributed.barrier()


def _place(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"


def _save(picture: Image.Image, place: Path) -> None:
    """Whole or not at all."""
    part = place.with_name(f".{place.name}.{os.getpid()}.part")
    try:
        picture.save(part, "PNG")
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)
