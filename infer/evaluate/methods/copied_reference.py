"""Bound: the reference handed out as the picture; no method should be praised for identity without beating its text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from pydantic import Field

from data_pipeline.settings import Settings
from infer.evaluate.cases import Case, EvaluatedSubject
from infer.evaluate.methods import Answer, Prepared
from infer.evaluate.settings import EvaluateSettings
from infer.subjects import Box
from model.reference import FILL, prepare_reference
from train.pictures import to_uint8

BOUND = True
FRAME: Box = ((1 - FILL) / 2, (1 - FILL) / 2, (1 + FILL) / 2, (1 + FILL) / 2)  # of a subject in a prepared reference


class MethodSettings(Settings):
    """The size of what is handed out."""

    size: int = Field(512, ge=8)  # pixels, longer side


class CopiedReference:
    """A photo as it is; a cut-out as the image encoder sees it, on grey. Of several subjects the first."""

    model = ""

    def __init__(self, settings: MethodSettings) -> None:
        self.size = settings.size

    def prepare(self, subjects: Sequence[EvaluatedSubject]) -> Prepared:
        return Prepared(pictures=1)

    def draw(self, cases: Sequence[Case]) -> list[Answer]:
        return [self._answer(case.subjects) for case in cases]

    def _answer(self, subjects: Sequence[EvaluatedSubject]) -> Answer:
        photo = subjects[0].photos[0].open()
        if photo.mode == "RGBA":
            shown = Image.fromarray(to_uint8(prepare_reference(np.array(photo), self.size)))
            return Answer(shown, (FRAME,) * len(subjects))
        photo = photo.convert("RGB")
        photo.thumbnail((self.size, self.size), Image.Resampling.LANCZOS)
        return Answer(photo, ((0.0, 0.0, 1.0, 1.0),) * len(subjects))


def answers(case: Case, settings: MethodSettings) -> bool:
    return bool(case.subjects)


def create(settings: MethodSettings, run: EvaluateSettings) -> CopiedReference:
    return CopiedReference(settings)
