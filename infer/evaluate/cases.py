"""What is asked for, the same for every method: subjects, prompts, seeds.

A protocol (`protocols/`) makes `Case`s, a method (`methods/`) answers each with a picture, a metric (`metrics/`)
scores it.
Cases of the same subjects form a group: the unit of work of a run, and of the bootstrap over subjects.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from PIL import Image

from infer.cutout import CutoutMethod, cut_out
from infer.subjects import Box

Part = Literal["single", "pair", "class"]  # one subject, two of them, or only their word (for class drift)
KINDS = (
    "new scene",
    "relation",
    "accessory",
    "property change",
    "art rendition",
    "material",
    "hybrid",
    "expression",
    "style",
)


@dataclass(frozen=True, eq=False)
class Photo:
    """A picture of a subject, opened when needed."""

    name: str  # for messages: the file, or what rendered it
    open: Callable[[], Image.Image]  # RGB, or RGBA where alpha 0 is background
    mask: Callable[[], Image.Image] | None = None  # white is the subject
    caption: str | None = None  # what it shows, with the subject's noun


@dataclass(frozen=True, eq=False)
class EvaluatedSubject:
    """A particular thing, and all pictures there are of it."""

    id: str  # unique in a protocol, fit for a file name
    noun: str  # the word for it in prompts
    photos: tuple[Photo, ...]  # the first `given` of them are what a method gets to see
    given: int = 1
    cutout: CutoutMethod = "auto"  # how the given photos lose their background
    tuning: tuple[Photo, ...] = ()  # with their backgrounds, for methods that are tuned to the subject

    @cached_property
    def cutouts(self) -> list[Image.Image]:
        """The given photos as RGBA cut-outs.

        Raises:
            UserError: a photo cannot be read or shows no subject.
        """
        return [
            cut_out(photo.open(), mask=photo.mask and photo.mask(), method=self.cutout, name=photo.name)
            for photo in self.photos[: self.given]
        ]

    @property
    def others(self) -> tuple[Photo, ...]:
        """Pictures that no method sees: for the copy index and real pictures."""
        return tuple(photo for photo in self.photos[self.given :] if photo not in self.tuning)


@dataclass(frozen=True, eq=False)
class Case:
    """One picture that every method is asked for."""

    id: str  # unique in a protocol, fit for a file name
    group: str  # its subjects' ids joined by "+", fit for a file name
    part: Part
    prompt: str  # names each subject's word; no placeholder
    kind: str  # one of KINDS
    seed: int
    subjects: tuple[EvaluatedSubject, ...]  # empty in part "class", whose pictures show none in particular
    words: tuple[str, ...]  # what the prompt calls each subject
    boxes: tuple[Box, ...] | None = None  # where each subject is to stand, fractions; None: the method's choice
    truth: Any = None  # what only the protocol and metrics made for it know (toybox: `toybox_truth.Request`)
    tuned_to: tuple[EvaluatedSubject, ...] = ()  # part "class": whom a tuned method has learnt, though none is named

    @property
    def prepared_for(self) -> tuple[EvaluatedSubject, ...]:
        """The subjects that a method is to be ready for."""
        return self.subjects or self.tuned_to


@dataclass(frozen=True)
class Protocol:
    """All that is asked for."""

    name: str
    cases: tuple[Case, ...]  # cases of a group stand together, in the order in which they are drawn
    holes: tuple[str, ...] = ()  # one line for each thing that was asked for and is missing, for the report

    def groups(self) -> list[tuple[Case, ...]]:
        """Cases by group."""
        return [tuple(found) for _, found in groupby(self.cases, key=lambda case: case.group)]


def as_file_name(text: str) -> str:
    """Letters, digits, `+`, `-` and `_` of a text, everything else as `_`."""
    return re.sub(r"[^\w+-]+", "_", text)
