"""Metrics: one file each, all of the shape of `Metric`; a new one is one more file and one more line in `METRICS`.

create(settings, protocol)      loads a `Metric`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from PIL import Image

from data_pipeline.errors import UserError
from infer.evaluate import cases
from infer.evaluate.cases import Case
from infer.subjects import Box

if TYPE_CHECKING:
    from infer.evaluate.settings import EvaluateSettings


@dataclass(frozen=True)
class Drawn:
    """A method's answer to a case."""

    case: Case
    picture: Image.Image  # RGB
    boxes: tuple[Box, ...] | None = None  # where the method says that its subjects stand, fractions

    @property
    def places(self) -> tuple[Box, ...] | None:
        """Where to look for the subjects: as the method says, else as it was asked."""
        return self.boxes or self.case.boxes


@dataclass(frozen=True)
class Column:
    """One number of a picture, and how to read it."""

    name: str  # key in tables: clip_t
    label: str  # for people: "CLIP-T"
    meaning: str  # one sentence
    better: str = "higher"  # higher | lower | "" where neither is better by itself
    backbone: str = ""  # what network it was measured with, named beside every number
    role: str = ""  # subject | prompt: the axis of the scatter on which it stands; "" on neither


class Metric(Protocol):
    """Scores the pictures of one group (`Case.group`) at a time."""

    columns: tuple[Column, ...]

    def score(self, drawn: Sequence[Drawn]) -> list[dict[str, float]]:
        """A dictionary a picture, with keys among the columns; a number that does not apply is left out."""
        ...


METRICS = {
    "clip": "infer.evaluate.metrics.clip",
    "dino": "infer.evaluate.metrics.dino",
    "diversity": "infer.evaluate.metrics.diversity",
    "toybox": "infer.evaluate.metrics.toybox",
}


def check_metrics(names: Sequence[str]) -> None:
    """Make sure that there are such metrics; nothing is loaded.

    Raises:
        UserError: one is unknown.
    """
    for name in names:
        if name not in METRICS:
            raise UserError(f"metrics: no metric {name!r}; expected some of {', '.join(METRICS)}")


def load_metric(name: str, settings: EvaluateSettings, protocol: cases.Protocol) -> Metric:
    """A metric of `METRICS`, ready to score pictures of that protocol.

    Raises:
        UserError: there is no such metric, or a network of it cannot be loaded.
    """
    check_metrics([name])
    metric: Metric = import_module(METRICS[name]).create(settings, protocol)
    return metric
