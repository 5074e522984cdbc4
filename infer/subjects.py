"""Subjects as a person names them: `--subject NAME=FILE[,FILE…][@x0,y0,x1,y1][:strength=W][:mask=FILE[,FILE…]]`.

First stage of generation: text arguments become `SubjectArgument`, pictures join in `Subject`, and `match_nouns` ties
each subject to one mention of its noun in the prompt (`dog#2` is the second one).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from data_pipeline.errors import UserError

MAX_STRENGTH = 2.0
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # other programs' refinements, refused with the reason
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 as fractions of the picture to be drawn
SYNTAX = "NAME=FILE[,FILE…][@x0,y0,x1,y1][:strength=W][:mask=FILE[,FILE…]]"


@dataclass
class Subject:
    """One particular thing to draw."""

    noun: str  # what it is, and unless `word` says otherwise what the prompt calls it
    references: list[Image.Image]  # RGBA cut-outs of any size; alpha 0 is background
    box: Box | None = None  # where to draw it; None: the seeded layout decides
    strength: float = 1.0  # 0 = off, 1 = as trained, at most 2
    occurrence: int | None = None  # which mention in the prompt, from 1; None: the first free one
    word: str | None = None  # what the prompt calls it where that is not its noun: a refined word, "z"

    @property
    def said(self) -> str:
        """The word that is looked for in the prompt."""
        return self.word or self.noun

    @property
    def label(self) -> str:
        """The name as typed, for error messages: `dog` or `dog#2`."""
        return self.said if self.occurrence is None else f"{self.said}#{self.occurrence}"


@dataclass(frozen=True)
class SubjectArgument:
    """One `--subject`, parsed and checked, its files not yet opened."""

    noun: str
    files: tuple[Path, ...]
    masks: tuple[Path, ...] = field(default=())  # one a file, or none
    box: Box | None = None
    strength: float = 1.0
    occurrence: int | None = None

    @property
    def is_refined(self) -> bool:
        """Whether it names the file of a refinement instead of pictures."""
        return any(file.suffix == ".safetensors" or file.suffix in PICKLED for file in self.files)


def parse_subject(text: str) -> SubjectArgument:
    """Read one `--subject` argument.

    Raises:
        UserError: no `=`, no file, a box or strength out of range, an unknown option.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.strip() or not value.strip():
        raise UserError(f"--subject {text}: expected {SYNTAX}, for example dog=dog.png")
    noun, occurrence = _parse_name(name.strip(), text)
    rest, *pairs = re.split(r":([a-z_]+)=", value)
    options = dict(zip(pairs[::2], pairs[1::2], strict=True))
    unknown = sorted(set(options) - {"strength", "mask"})
    if unknown:
        raise UserError(f"--subject {text}: unknown option :{unknown[0]}=; the options are :strength= and :mask=")
    rest, box = _split_box(rest, text)
    files, masks = _files(rest), _files(options.get("mask", ""))
    if not files:
        raise UserError(f"--subject {text}: no file given; expected {SYNTAX}")
    if masks and len(masks) != len(files):
        raise UserError(f"--subject {text}: {len(masks)} masks for {len(files)} files; give one mask a file, or none")
    strength = _parse_strength(options["strength"], text) if "strength" in options else 1.0
    return SubjectArgument(noun, files, masks, box, strength, occurrence)


def check_box(box: Sequence[float], where: str) -> Box:
    """Return the box as a tuple.

    Args:
        box: x0, y0, x1, y1 as fractions of the picture.
        where: the argument to name in the error.
    Raises:
        UserError: not four numbers, outside 0–1, empty or upside down.
    """
    if len(box) != 4:
        raise UserError(f"{where}: a box has four numbers x0,y0,x1,y1, got {len(box)}")
    x0, y0, x1, y1 = (float(value) for value in box)
    shown = ",".join(f"{value:g}" for value in (x0, y0, x1, y1))
    if not all(0 <= value <= 1 for value in (x0, y0, x1, y1)):  # also refuses nan
        raise UserError(f"{where}: box {shown} leaves the picture; the numbers are fractions from 0 to 1")
    if x1 <= x0 or y1 <= y0:
        raise UserError(
            f"{where}: box {shown} is upside down or empty; expected left < right and top < bottom as x0,y0,x1,y1"
        )
    return x0, y0, x1, y1


def check_strength(strength: float, where: str) -> float:
    """Return the strength if it lies in 0–2, else raise UserError naming `where`."""
    if not 0 <= strength <= MAX_STRENGTH:
        raise UserError(f"{where}: strength {strength:g}; expected 0 (off) to {MAX_STRENGTH:g}, 1 is as trained")
    return float(strength)


def visible_size(cutout: Image.Image, where: str) -> tuple[int, int]:
    """Width and height in pixels of what the alpha channel shows; UserError naming `where` if it shows nothing."""
    opaque = cutout.convert("RGBA").getchannel("A").point(lambda alpha: 255 if alpha >= 128 else 0)
    box = opaque.getbbox()
    if box is None:
        raise UserError(f"{where}: empty cut-out, every pixel is transparent; give a picture that shows the subject")
    return box[2] - box[0], box[3] - box[1]


def match_nouns(prompt: str, subjects: Sequence[Subject]) -> list[tuple[int, int]]:
    """Find the mention of each subject in the prompt.

    A mention is the noun as a whole word, in either case; a plural mention ("two dogs") serves any number of subjects.

    Returns:
        Character span (start, end) of the noun for each subject, in the subjects' order.
    Raises:
        UserError: the noun is missing, or mentioned less often than asked.
    """
    asked = Counter((entry.said.lower(), entry.occurrence) for entry in subjects if entry.occurrence is not None)
    for (noun, number), count in asked.items():
        if count > 1:
            raise UserError(f"subject {noun}#{number}: given {count} times; each occurrence takes one subject")
    spans: list[tuple[int, int]] = []
    taken = set(asked)  # (noun, occurrence)
    for subject in subjects:
        mentions = [found.span(1) for found in _mentions(prompt, subject.said)]
        if not mentions:
            raise UserError(
                f"subject {subject.label}: the prompt {prompt!r} lacks the word {subject.said!r}; name it there"
            )
        noun = subject.said.lower()
        occurrence = subject.occurrence
        if occurrence is None:
            free = [k for k in range(1, len(mentions) + 1) if (noun, k) not in taken]
            plural = [k for k, span in enumerate(mentions, 1) if _is_plural(prompt, span)]
            occurrence = (free + plural + [len(mentions) + 1])[0]
        if occurrence > len(mentions):
            raise UserError(
                f"subject {subject.label}: the prompt {prompt!r} has {subject.said!r} {len(mentions)} time(s), fewer "
                "than the subjects need; mention it once for each"
            )
        taken.add((noun, occurrence))
        spans.append(mentions[occurrence - 1])
    return spans


def with_mentioned(prompt: str, given: Sequence[Subject], known: Sequence[Subject]) -> list[Subject]:
    """Subjects of a prompt, and after them those of `known` that it names too: one for each mention that is left."""
    subjects = list(given)
    for one in known:
        mentions = re.findall(rf"(?<!\w){re.escape(one.said)}(?!\w)", prompt, re.IGNORECASE)
        there = sum(subject.said.lower() == one.said.lower() for subject in given)
        subjects += [one] * (len(mentions) - there)
    return subjects


def _mentions(prompt: str, noun: str) -> list[re.Match[str]]:
    words = r"\s+".join(re.escape(word) for word in noun.split())
    return list(re.finditer(rf"(?<!\w)({words})(?:e?s)?(?!\w)", prompt, re.IGNORECASE))


def _is_plural(prompt: str, span: tuple[int, int]) -> bool:
    return prompt[span[1] : span[1] + 1].isalpha()


def _parse_name(name: str, text: str) -> tuple[str, int | None]:
    noun, hash_sign, number = name.partition("#")
    if not hash_sign:
        return noun, None
    if not noun.strip() or not number.isdecimal() or int(number) < 1:
        raise UserError(f"--subject {text}: expected NAME#K with K = 1, 2, … (which mention of the noun), got {name!r}")
    return noun.strip(), int(number)


def _split_box(rest: str, text: str) -> tuple[str, Box | None]:
    """Split off a trailing `@x0,y0,x1,y1`; a file whose own name holds an @ stays whole."""
    head, at_sign, tail = rest.rpartition("@")
    own_name = f"{head.rpartition(',')[2]}@{tail.partition(',')[0]}"
    if not at_sign or Path(own_name).exists() or re.match(r"\w+\.[A-Za-z]\w+(,|$)", tail):
        return rest, None
    try:
        numbers = [float(number) for number in tail.split(",")]
    except ValueError:
        raise UserError(f"--subject {text}: box {tail!r} is not four numbers x0,y0,x1,y1") from None
    return head, check_box(numbers, f"--subject {text}")


def _parse_strength(value: str, text: str) -> float:
    try:
        return check_strength(float(value), f"--subject {text}")
    except ValueError:
        raise UserError(f"--subject {text}: strength {value!r} is no number; expected 0 to {MAX_STRENGTH:g}") from None


def _files(text: str) -> tuple[Path, ...]:
    return tuple(Path(name.strip()).expanduser() for name in text.split(",") if name.strip())
