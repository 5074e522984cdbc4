"""Captions of toybox scenes: true places and relations, and no more about a subject than its reference must give.

Unless told otherwise, a quarter of the captions names a colour, and for more than half of the entities the noun gives
way to its group word (animal, fruit, vehicle, toy, thing …), so that the text alone cannot draw the subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from data_pipeline.toybox.backgrounds import BACKGROUNDS

Generator = np.random.Generator
Box = tuple[float, float, float, float]

COLOUR_SHARE = 0.25  # of the captions with subjects name one colour
GROUP_SHARE = 0.6  # of the entities are named by their group word
_HUES = {
    8: "red",
    20: "orange",
    33: "yellow",
    80: "green",
    100: "turquoise",
    128: "blue",
    150: "purple",
    170: "pink",
    181: "red",
}  # upper ends, OpenCV's hues
COLOURS = ("red", "orange", "yellow", "green", "turquoise", "blue", "purple", "pink", "white", "black", "grey", "brown")


@dataclass(frozen=True)
class Mention:
    """An entity as the caption sees it."""

    noun: str
    group_word: str
    colour: str
    box: Box  # xyxy as fractions of the picture


@dataclass(frozen=True)
class Caption:
    """A caption and where its entities stand in it."""

    text: str
    nouns: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]  # characters of each noun


def colour_name(rgba: np.ndarray) -> str:
    """The colour word for most of a cut-out's opaque pixels; (H, W, 4) uint8."""
    coarse = np.ascontiguousarray(rgba[::4, ::4])
    hsv = cv2.cvtColor(coarse[..., :3], cv2.COLOR_RGB2HSV)[coarse[..., 3] > 127].astype(int)
    hue, saturation, value = np.median(hsv, axis=0) if len(hsv) else (0, 0, 0)
    if value < 60:
        return "black"
    if saturation < 45:
        return "white" if value > 190 else "grey"
    if hue < 22 and value < 170:
        return "brown"
    return next(name for limit, name in _HUES.items() if hue < limit)


def write_caption(
    mentions: Sequence[Mention],
    background: str,
    rng: Generator,
    *,
    group_share: float = GROUP_SHARE,
    colour_share: float = COLOUR_SHARE,
) -> Caption:
    """A caption of the entities, in their order, on a background.

    Args:
        group_share: chance of each entity, 0..1, that its group word stands for its noun.
        colour_share: chance of the caption, 0..1, that it names the colour of one of them.
    """
    place = BACKGROUNDS[background]
    if not mentions:
        return Caption(
            str(rng.choice([place.alone, f"a picture of {place.alone}", f"nothing but {place.alone}"])), (), ()
        )
    nouns = [m.group_word if rng.random() < group_share else m.noun for m in mentions]
    coloured = int(rng.integers(len(mentions))) if rng.random() < colour_share else -1
    phrases = [_phrase(nouns, i, mentions[i].colour if i == coloured else "") for i in range(len(nouns))]
    where = str(rng.choice(place.phrases))
    if len(mentions) == 1:
        pieces = _one(phrases[0], mentions[0].box, where, rng)
    elif len(mentions) == 2:
        pieces = _two(phrases, (mentions[0].box, mentions[1].box), where, rng)
    else:
        pieces = _many(phrases, [m.box for m in mentions], where, rng)
    return _assemble(pieces, nouns)


def _phrase(nouns: Sequence[str], index: int, colour: str) -> tuple[str, int]:
    """ "a red " / "another " / "more " / "" before noun `index`."""
    word = f"{colour} {nouns[index]}" if colour else nouns[index]
    again = nouns[index] in nouns[:index]
    if is_plural(nouns[index]):
        article = "more " if again else ""
    else:
        article = "another " if again else "an " if word[0] in "aeiou" else "a "
    return f"{article}{colour} " if colour else article, index


def is_plural(noun: str) -> bool:
    """Socks, but neither a bus, a dress nor a compass."""
    return noun.endswith("s") and not noun.endswith(("ss", "us", "ros"))


Piece = str | tuple[str, int]


def _one(phrase: tuple[str, int], box: Box, where: str, rng: Generator) -> list[Piece]:
    side = place_word(box)
    templates: list[list[Piece]] = [
        [phrase, f" {where}"],
        ["a photo of ", phrase, f" {where}"],
        ["a picture of ", phrase, f" {where}, {side}"],
        [phrase, f" {where}, {side}"],
        [f"{where}, ", phrase, f" {side}"],
        ["there is ", phrase, f" {side}, {where}"],
    ]
    return templates[int(rng.integers(len(templates)))]


def _two(phrases: Sequence[tuple[str, int]], boxes: tuple[Box, Box], where: str, rng: Generator) -> list[Piece]:
    relation = relation_word(*boxes)
    a, b = phrases
    templates: list[list[Piece]] = [
        [a, f" {relation} ", b, f" {where}"],
        ["a photo of ", a, f" {relation} ", b, f" {where}"],
        [a, " next to ", b, f" {where}"],
        [a, " and ", b, f" {where}"],
        [f"{where}, ", a, f" {relation} ", b],
        [a, f" {place_word(boxes[0])} and ", b, f" {place_word(boxes[1])}, {where}"],
    ]
    return templates[int(rng.integers(len(templates)))]


def _many(phrases: Sequence[tuple[str, int]], boxes: Sequence[Box], where: str, rng: Generator) -> list[Piece]:
    placed = rng.random() < 0.4
    pieces: list[Piece] = ["a photo of "] if rng.random() < 0.3 else []
    for i, phrase in enumerate(phrases):
        pieces += ["" if i == 0 else " and " if i == len(phrases) - 1 else ", ", phrase]
        if placed:
            pieces.append(f" {place_word(boxes[i])}")
    return [*pieces, f"{',' if placed else ''} {where}"]


def place_word(box: Box) -> str:
    """Where the box stands: "on the left", "at the top", "in the middle" …"""
    x, y = (box[0] + box[2]) / 2 - 0.5, (box[1] + box[3]) / 2 - 0.5
    if max(abs(x), abs(y)) < 0.1:
        return "in the middle"
    if abs(x) >= abs(y):
        return "on the left" if x < 0 else "on the right"
    return "at the top" if y < 0 else "at the bottom"


def relation_word(first: Box, second: Box) -> str:
    """How the first box stands to the second: "to the left of", "above" …"""
    x = (first[0] + first[2] - second[0] - second[2]) / 2
    y = (first[1] + first[3] - second[1] - second[3]) / 2
    if abs(x) >= abs(y):
        return "to the left of" if x < 0 else "to the right of"
    return "above" if y < 0 else "below"


def _assemble(pieces: Sequence[Piece], nouns: Sequence[str]) -> Caption:
    text, spans = "", {}
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
        else:
            before, index = piece
            spans[index] = (len(text) + len(before), len(text) + len(before) + len(nouns[index]))
            text += before + nouns[index]
    return Caption(text, tuple(nouns), tuple(spans[i] for i in range(len(nouns))))
