"""Subjects, cases and pictures of a few random pixels, for the tests of metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from infer.evaluate.cases import Case, EvaluatedSubject, Part, Photo
from infer.evaluate.settings import EvaluateSettings
from infer.subjects import Box


def picture(seed: int, width: int = 48, height: int = 40) -> Image.Image:
    """Coarse coloured noise, another one for each seed."""
    cells = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def subject(noun: str, photos: Sequence[Image.Image], given: int = 1) -> EvaluatedSubject:
    """A thing and its photos; the first `given` are what methods see."""
    shown = tuple(Photo(f"{noun} {i}", photo.copy) for i, photo in enumerate(photos))
    return EvaluatedSubject(noun, noun, shown, given)


def case(
    *subjects: EvaluatedSubject,
    prompt: str = "a dog on the beach",
    boxes: tuple[Box, ...] | None = None,
    seed: int = 0,
    words: tuple[str, ...] | None = None,
    truth: Any = None,
) -> Case:
    """A case of those subjects; without any, one of bare class words."""
    parts: tuple[Part, ...] = ("class", "single", "pair")
    group = "+".join(one.id for one in subjects) or "class"
    said = tuple(one.noun for one in subjects) if words is None else words
    return Case(
        f"{group}--{seed}", group, parts[len(subjects)], prompt, "new scene", seed, subjects, said, boxes, truth
    )


def settings(**changes: Any) -> EvaluateSettings:
    """Settings of an evaluation that names one method."""
    content = {"name": "tiny", "output": "out", "protocol": {"kind": "folder"}, "methods": {"ours": {}}, **changes}
    return EvaluateSettings.model_validate(content)
