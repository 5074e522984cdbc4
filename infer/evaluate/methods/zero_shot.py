"""Our model, no tuning: every setting of `infer/drawing.py` can be said, so that each ablation is a row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from pydantic import Field

from infer.drawing import DrawSettings, Precision, open_pipeline, sampler
from infer.evaluate.cases import Case, EvaluatedSubject
from infer.evaluate.methods import Answer, Prepared
from infer.evaluate.settings import EvaluateSettings
from infer.pipeline import SubjectDiffusionPipeline
from infer.subjects import MAX_STRENGTH, Subject

BOUND = False


class MethodSettings(DrawSettings):
    """How `generate` draws, how strong the subjects are, and whether references are given at all."""

    strength: float = Field(1.0, ge=0, le=MAX_STRENGTH)  # of every subject; 0 is off, 1 as trained
    references: bool = True  # false: same prompts and seeds without subjects, what the text alone gives away


class ZeroShot:
    """Draws from the references in one pass."""

    def __init__(self, settings: MethodSettings, device: str, precision: Precision) -> None:
        self.settings = settings
        opened = _pipeline(settings.model, settings.base, device, precision)
        self.pipeline, self.own_scheduler, self.model = opened

    def prepare(self, subjects: Sequence[EvaluatedSubject]) -> Prepared:
        return Prepared(pictures=max((one.given for one in subjects), default=0) if self.settings.references else 0)

    def draw(self, cases: Sequence[Case]) -> list[Answer]:
        subjects = [self._subjects(case) for case in cases]
        self.pipeline.scheduler = sampler(self.own_scheduler, self.settings.scheduler)
        drawn = self.pipeline(
            [case.prompt for case in cases],
            subjects,
            **self.settings.call_arguments(),
            generator=[torch.Generator().manual_seed(case.seed) for case in cases],
        )
        asked = [None if boxes is None else tuple(boxes) for boxes in drawn.boxes]
        return [Answer(picture, boxes) for picture, boxes in zip(drawn.images, asked, strict=True)]

    def _subjects(self, case: Case) -> list[Subject]:
        if not self.settings.references:
            return []
        boxes = case.boxes if case.boxes and self.settings.layout != "none" else (None,) * len(case.subjects)
        return [
            Subject(word, subject.cutouts, box=box, strength=self.settings.strength)
            for word, subject, box in zip(case.words, case.subjects, boxes, strict=True)
        ]


@lru_cache(maxsize=1)
def _pipeline(
    model: str, base: str | None, device: str, precision: Precision
) -> tuple[SubjectDiffusionPipeline, Any, str]:
    """Pipeline, its own sampler, fingerprint. The last one is kept: rows and sweeps of one model follow each other."""
    pipeline = open_pipeline(DrawSettings(model=model, base=base), device, precision)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, pipeline.scheduler, pipeline.fingerprint()


def answers(case: Case, settings: MethodSettings) -> bool:
    return True


def create(settings: MethodSettings, run: EvaluateSettings) -> ZeroShot:
    return ZeroShot(settings, run.device, run.precision)
