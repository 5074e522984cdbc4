"""Bound: the plain base, diffusers' `StableDiffusionPipeline` on the same prompts and seeds; it sees no reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from pydantic import Field

from data_pipeline.settings import Settings
from infer.drawing import Precision, SchedulerName, sampler, torch_dtype, usable_device
from infer.evaluate.cases import Case, EvaluatedSubject
from infer.evaluate.methods import Answer, Prepared
from infer.evaluate.settings import EvaluateSettings
from infer.loading import hush_libraries, load_base
from model.saving import base_fingerprint

BOUND = True


class MethodSettings(Settings):
    """Which base, and how it draws."""

    base: str  # shipped name, folder or hub id
    scheduler: SchedulerName | None = None  # sampler; null: the base's own
    steps: int = Field(50, ge=1, le=1000)
    guidance_scale: float = Field(7.5, ge=0)
    negative_prompt: str = ""
    width: int | None = Field(None, gt=0)  # pixels; null: the size the base was trained at
    height: int | None = Field(None, gt=0)


class PlainBase:
    """Draws from the text alone."""

    def __init__(self, settings: MethodSettings, device: str, precision: Precision) -> None:
        self.settings = settings
        self.pipeline, self.own_scheduler, self.model = _pipeline(settings.base, device, precision)

    def prepare(self, subjects: Sequence[EvaluatedSubject]) -> Prepared:
        return Prepared()

    def draw(self, cases: Sequence[Case]) -> list[Answer]:
        self.pipeline.scheduler = sampler(self.own_scheduler, self.settings.scheduler)
        drawn = self.pipeline(
            [case.prompt for case in cases],
            num_inference_steps=self.settings.steps,
            guidance_scale=self.settings.guidance_scale,
            negative_prompt=[self.settings.negative_prompt] * len(cases),
            width=self.settings.width,
            height=self.settings.height,
            generator=[torch.Generator().manual_seed(case.seed) for case in cases],
        )
        return [Answer(picture, case.boxes) for picture, case in zip(drawn.images, cases, strict=True)]


@lru_cache(maxsize=1)
def _pipeline(base: str, device: str, precision: Precision) -> tuple[StableDiffusionPipeline, Any, str]:
    hush_libraries()
    pipeline = load_base(base, torch_dtype(precision)).to(usable_device(device))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.scheduler, base_fingerprint(pipeline.unet, pipeline.text_encoder)


def answers(case: Case, settings: MethodSettings) -> bool:
    return True


def create(settings: MethodSettings, run: EvaluateSettings) -> PlainBase:
    return PlainBase(settings, run.device, run.precision)
