"""Photos of a subject that the model is shown while it learns, and again when the subject is drawn.

Without them a refinement is learnt with the subjects of the base null. With them it adds to what `generate` makes of
the same photos: each sample is shown others than its own where there are any, so that nothing is gained by copying.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_pipeline.errors import UserError
from infer.cutout import CutoutMethod, cut_out
from infer.refine.method import Concept
from infer.subjects import Box


@dataclass(frozen=True)
class Shown:
    """Which photos one sample is shown, and where it shows the subject itself."""

    concept: int  # counted from 0
    pictures: tuple[int, ...]  # of its pictures
    box: Box | None  # xyxy as fractions; None: it is not told where


def cutouts_of(concept: Concept) -> list[Image.Image]:
    """A concept's pictures, RGBA, cut out by what tells their subject apart, else as `generate` does; a style's whole.

    Raises:
        UserError: a picture in which no subject stands out.
    """
    method: CutoutMethod = "none" if concept.kind == "style" else "auto"
    return [
        cut_out(
            Image.fromarray(picture.rgba),
            mask=None if picture.subject is None else Image.fromarray(picture.subject),
            method=method,
            name=str(picture.path),
        )
        for picture in concept.pictures
    ]


def shown_cutouts(concept: Concept, number: int) -> list[Image.Image]:
    """The cut-outs from which `number` are shown at a time; none for 0.

    Raises:
        UserError: a style, fewer pictures, or one in which no subject stands out.
    """
    if number and concept.kind == "style":
        raise UserError(f"references={number}: a style is no subject that can be shown; leave references out")
    if number > len(concept.pictures):
        raise UserError(
            f"references={number}: {concept.placeholder!r} has {len(concept.pictures)} picture(s); give more, or show "
            "fewer"
        )
    return [_without_hidden(cutout) for cutout in cutouts_of(concept)] if number else []


def _without_hidden(cutout: Image.Image) -> Image.Image:
    """A file that is passed on shall hold nothing of what stood around its subject."""
    pixels = np.array(cutout)  # (H, W, 4)
    pixels[pixels[..., 3] == 0] = 0
    return Image.fromarray(pixels)


def draw_references(own: int, pictures: int, number: int, rng: np.random.Generator) -> tuple[int, ...]:
    """`number` of `pictures` at random, a sample's own last of all."""
    order = [int(index) for index in rng.permutation(pictures)]
    return tuple(sorted(order, key=lambda index: index == own)[:number])
