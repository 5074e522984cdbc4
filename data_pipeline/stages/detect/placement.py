"""Which box shows which phrase, all boxes and phrases of a picture together, with what the caption says of places.

A phrase in the singular names one thing, so it gets one box; two boxes of one thing are one too many; and "on the
left", "above" and their like, which a caption may say between its phrases, are held against where the boxes are. The
last is the spatial resolver of Subramanian et al., ReCLIP (ACL 2022), with soft instead of hard relations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.boxes import pairwise_intersection
from data_pipeline.stages import NounChunk

STEEPNESS = 14.0  # of a relation: a tenth of the picture the wrong way costs a factor of four
RELIABLE = 0.9  # share of what a caption says of places that is meant and read rightly
MIDDLE = 0.15  # spread of "in the middle", share of the picture
BEAM = 48  # placements of a picture that are followed
CHOICES = 8  # best boxes of a phrase that are tried
SAME_THING = 0.6  # share of the smaller box that another covers: both show one thing, or a part and its whole
_SIDES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1)}
_PLACE = re.compile(r"\b(?:on|at|in|to) the (?:far |very )?(left|right|top|bottom|middle|center|centre)\b(?! of\b)")
_RELATIONS = (  # between a phrase and the next one: where the first is, seen from the second
    (re.compile(r"\bto the left of\b|\bleft of\b"), (-1, 0)),
    (re.compile(r"\bto the right of\b|\bright of\b"), (1, 0)),
    (re.compile(r"\babove\b|\bover\b|\bon top of\b"), (0, -1)),
    (re.compile(r"\bbelow\b|\bunder\b|\bunderneath\b|\bbeneath\b"), (0, 1)),
)
Direction = tuple[int, int]


@dataclass(frozen=True)
class Said:
    """What a caption says of its phrases' places; positions in the sequence of chunks."""

    places: dict[int, str]  # chunk -> left, right, top, bottom, middle
    relations: dict[int, Direction]  # chunk -> its direction from the next one


def read_places(chunks: Sequence[NounChunk]) -> Said:
    """Places and relations from the words that follow each chunk.

    After a comma, at the end ("a car in the snow, on the left"), a place is that of the first chunk: what the caption
    is about.
    """
    places: dict[int, str] = {}
    relations: dict[int, Direction] = {}
    for index, chunk in enumerate(chunks):
        words = chunk.following.lower()
        if found := _PLACE.search(words):
            last = index == len(chunks) - 1
            about = 0 if last and words.lstrip().startswith(",") else index
            places.setdefault(about, found[1])
        for pattern, direction in _RELATIONS:
            if index + 1 < len(chunks) and pattern.search(words):
                relations.setdefault(index, direction)
    return Said(places, relations)


def place_score(place: str, centres: np.ndarray) -> np.ndarray:
    """How much likelier than by chance a place word is said of box centres (N, 2), shares of the picture: log, (N,)."""
    offset = centres - 0.5
    if place in _SIDES:
        return relation_score(_SIDES[place], offset)
    return _softened(2 * np.exp(-((np.abs(offset).max(axis=-1) / MIDDLE) ** 2) / 2))


def relation_score(direction: Direction, offset: np.ndarray) -> np.ndarray:
    """How much likelier than by chance things `offset` (…, 2) from others are said to be `direction` of them: log."""
    return _softened(2 / (1 + np.exp(-STEEPNESS * (offset * direction).sum(axis=-1))))


def _softened(ratio: np.ndarray) -> np.ndarray:
    return np.log(RELIABLE * ratio + 1 - RELIABLE)


def is_plural(chunk: NounChunk) -> bool:
    """Whether the chunk may name several things: its last word is not the lemma of its head, or a number leads it."""
    words = chunk.text.lower().split()
    return not words or words[-1] != chunk.noun.split()[-1] or words[0] in _NUMBERS


_NUMBERS = frozenset("two three four five six seven eight nine ten many several some 2 3 4 5 6 7 8 9".split())


def place_chunks(
    scores: np.ndarray, boxes: np.ndarray, size: tuple[int, int], chunks: Sequence[NounChunk], least: float
) -> list[tuple[int, int]]:
    """The best joint placement: pairs (box, chunk). A box is used once, a chunk in the singular too.

    Args:
        scores: (Q, C) 0..1 of each box for each chunk.
        boxes: (Q, 4) xyxy in pixels.
        size: width and height of the picture, pixels.
        least: a chunk rather has no box than one with a lower score.
    """
    said = read_places(chunks)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2 / np.asarray(size)  # (Q, 2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    covered = pairwise_intersection(boxes, boxes) / np.maximum(np.minimum(areas[:, None], areas), 1e-9)  # (Q, Q)
    gains = np.log(np.maximum(scores, 1e-6) / least)  # (Q, C)
    for chunk, place in said.places.items():
        gains[:, chunk] += place_score(place, centres)
    beam: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for chunk in range(len(chunks)):
        able = np.flatnonzero(scores[:, chunk] >= least)
        best = [int(box) for box in able[np.argsort(-gains[able, chunk], kind="stable")[:CHOICES]]]
        grown = [(total, (*placed, -1)) for total, placed in beam]
        for total, placed in beam:
            for box in best:
                if any(other >= 0 and covered[box, other] > SAME_THING for other in placed):
                    continue
                gain = gains[box, chunk]
                direction = said.relations.get(chunk - 1)
                if direction and placed[-1] >= 0:
                    gain += relation_score(direction, centres[placed[-1]] - centres[box])
                grown.append((total + float(gain), (*placed, box)))
        beam = sorted(grown, key=lambda entry: -entry[0])[:BEAM]
    pairs = [(box, chunk) for chunk, box in enumerate(beam[0][1]) if box >= 0]
    return pairs + _more_of_plurals(pairs, scores, covered, chunks, least)


def _more_of_plurals(
    pairs: Sequence[tuple[int, int]],
    scores: np.ndarray,
    covered: np.ndarray,
    chunks: Sequence[NounChunk],
    least: float,
) -> list[tuple[int, int]]:
    """Boxes that are left over and show best what a placed chunk in the plural names."""
    plural = {chunk for _, chunk in pairs if is_plural(chunks[chunk])}
    taken = [box for box, _ in pairs]
    found = []
    for box in np.argsort(-scores.max(axis=1, initial=0), kind="stable").tolist():
        chunk = int(scores[box].argmax()) if len(chunks) else -1
        if chunk in plural and scores[box, chunk] >= least and not (covered[box, taken] > SAME_THING).any():
            found.append((box, chunk))
            taken.append(box)
    return found
