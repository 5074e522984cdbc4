"""Where subjects stand when nobody says: seeded boxes that do not overlap.

Used by the pipeline before the subject tokens are made, since each token carries its subject's box.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipeline.errors import UserError
from infer.subjects import Box, Subject, visible_size

MAX_SUBJECTS = 8
MARGIN = 0.02  # of the picture, kept free at its edges
GAP = 0.02  # of the picture, kept free between boxes
SHRINK = 0.93  # of the side, after each round of failed throws
THROWS = 40  # places tried before the boxes shrink
SMALLEST_SIDE = 0.06  # of the picture: below this there is no room


def place_subjects(subjects: Sequence[Subject], seed: int, height_by_width: float = 1.0) -> list[Box]:
    """Boxes of the subjects in their order; those without one get a seeded box of their first reference's shape.

    Args:
        subjects: at most 8.
        seed: the same seed gives the same boxes.
        height_by_width: height ÷ width of the picture to be drawn.
    Raises:
        UserError: as `seeded_layout`; a reference that is transparent everywhere.
    """
    shown = [visible_size(subject.references[0], f"subject {subject.label}") for subject in subjects]
    aspects = [width / height * height_by_width for width, height in shown]
    return seeded_layout([subject.box for subject in subjects], seed, aspects)


def seeded_layout(boxes: Sequence[Box | None], seed: int, aspects: Sequence[float] | None = None) -> list[Box]:
    """Fill in the boxes that are None, without overlap among them or with the given ones.

    Args:
        boxes: one entry a subject, at most 8; xyxy fractions 0..1, or None for "anywhere".
        seed: the same seed gives the same layout.
        aspects: width ÷ height of each subject in units of the picture's sides; None: square.
    Returns:
        A box for each subject; given ones are returned as they are.
    Raises:
        UserError: more than 8 subjects, or the given boxes leave no room.
    """
    if len(boxes) > MAX_SUBJECTS:
        raise UserError(f"{len(boxes)} subjects; at most {MAX_SUBJECTS} can be placed in one picture")
    free = [index for index, box in enumerate(boxes) if box is None]
    if not free:
        return [box for box in boxes if box is not None]
    shapes = np.clip(np.ones(len(boxes)) if aspects is None else np.asarray(aspects, float), 1 / 3, 3.0)
    random = np.random.default_rng([seed % 2**32, len(boxes)])
    # One subject fills about half of the side, n subjects together about as much of the area as two do.
    largest = 0.66 if len(boxes) == 1 else 0.62 / np.sqrt(len(boxes))
    sides = random.uniform(0.8 * largest, largest, size=len(boxes))
    while sides.max() >= SMALLEST_SIDE:
        placed = _throw(boxes, free, sides, shapes, random)
        if placed is not None:
            return placed
        sides *= SHRINK
    raise UserError("the given boxes leave no room for the other subjects; make them smaller or give each subject one")


def _throw(
    boxes: Sequence[Box | None], free: Sequence[int], sides: np.ndarray, shapes: np.ndarray, random: np.random.Generator
) -> list[Box] | None:
    """One try at a whole layout with boxes of area side²; None if some box found no place."""
    placed: list[Box | None] = list(boxes)
    for index in free:
        width, height = sides[index] * np.sqrt(shapes[index]), sides[index] / np.sqrt(shapes[index])
        limit = (1 - 2 * MARGIN) / max(width, height, 1 - 2 * MARGIN)
        width, height = width * limit, height * limit
        for _ in range(THROWS):
            x0 = float(random.uniform(MARGIN, 1 - MARGIN - width))
            y0 = float(random.uniform(MARGIN, 1 - MARGIN - height))
            box = (x0, y0, x0 + float(width), y0 + float(height))
            if not any(_touch(box, other) for other in placed if other is not None):
                placed[index] = box
                break
        else:
            return None
    return [box for box in placed if box is not None]


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] + GAP and b[0] < a[2] + GAP and a[1] < b[3] + GAP and b[1] < a[3] + GAP
