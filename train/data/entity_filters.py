"""Which entities of a sample are trained on: the train-time filters of Subject-Diffusion, one pure function each.

What a record alone tells (noun, score, references) is judged before the crop, so that the crop keeps the boxes that
matter; places are judged after it. Every drop is counted by reason. Values: `EntityFilters` (arXiv 2307.11410, code).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.boxes import pairwise_intersection
from data_pipeline.errors import UserError
from data_pipeline.record import BoxPx, Entity
from train.settings import EntityFilters

Reason = Literal[
    "noun",  # not in the file of nouns
    "score",
    "no_reference",  # references come from other pictures, and there is none of it
    "cut_off",  # the square shows too little of its box
    "area",
    "aspect",
    "mask",  # covers too little of its box
    "overlap",
    "white",  # the picture is a cut-out on white, as shops show them
    "too_many",
]
SEEN_SHARE = 0.6  # of an entity's box that the square must show for it to stay a subject
WHITE = 0.9 * 255  # a pixel is white where every channel is above


@dataclass(frozen=True)
class Candidate:
    """An entity as the square shows it."""

    entity: Entity
    box_xyxy_px: BoxPx  # the detector's, in the square and clipped to it
    mask: np.ndarray  # (size, size) bool
    seen: float  # share of its box that the square shows


def read_nouns(path: Path) -> frozenset[str]:
    """The nouns of a file, one a line, in lower case; empty lines and those that start with # are passed over.

    Raises:
        UserError: it cannot be read, or names nothing.
    """
    try:
        lines = path.expanduser().read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"nouns={path}: cannot be read ({error}); give a text file with one noun a line") from error
    nouns = frozenset(line.strip().lower() for line in lines if line.strip() and not line.startswith("#"))
    if not nouns:
        raise UserError(f"nouns={path}: names no noun; give one a line, or leave the key out")
    return nouns


def eligible(
    entities: Sequence[Entity],
    filters: EntityFilters,
    nouns: frozenset[str] | None,
    need_references: bool,
    drops: Counter[str],
) -> list[Entity]:
    """Those that may be trained on as far as the record tells; `drops` counts the others by reason."""
    kept = []
    for entity in entities:
        reason = reason_of_record(entity, filters, nouns, need_references)
        if reason is None:
            kept.append(entity)
        else:
            drops[reason] += 1
    return kept


def reason_of_record(
    entity: Entity, filters: EntityFilters, nouns: frozenset[str] | None, need_references: bool
) -> Reason | None:
    """Why an entity is left out before its place is looked at; None: it is not."""
    if nouns is not None and not {entity.noun.lower(), entity.phrase.lower()} & nouns:
        return "noun"
    if entity.score < filters.min_score:
        return "score"
    return "no_reference" if need_references and not entity.references else None


def placed_well(
    picture: np.ndarray, candidates: Sequence[Candidate], filters: EntityFilters, most: int, drops: Counter[str]
) -> list[Candidate]:
    """At most `most` candidates whose places pass, the largest masks first; `drops` counts the others by reason.

    Args:
        picture: (size, size, 3) uint8.
    """
    if white_share(picture) > filters.max_white:
        drops["white"] += len(candidates)
        return []
    kept = []
    for candidate in candidates:
        reason = reason_of_place(candidate, filters)
        if reason is None:
            kept.append(candidate)
        else:
            drops[reason] += 1
    boxes, scores = [c.box_xyxy_px for c in kept], [c.entity.score for c in kept]
    apart = without_overlaps(boxes, scores, filters.max_overlap)
    drops["overlap"] += len(kept) - len(apart)
    largest = sorted((kept[i] for i in apart), key=lambda candidate: -int(candidate.mask.sum()))
    drops["too_many"] += len(largest[most:])
    return largest[:most]


def reason_of_place(candidate: Candidate, filters: EntityFilters) -> Reason | None:
    """Why an entity is left out for its own box and mask; None: it is not."""
    box, mask = candidate.box_xyxy_px, candidate.mask
    if candidate.seen < SEEN_SHARE or not mask.any():
        return "cut_off"
    if not filters.min_area <= area_share(box, mask.shape[0]) <= filters.max_area:
        return "area"
    if not filters.min_aspect <= aspect(box) <= filters.max_aspect:
        return "aspect"
    return "mask" if mask_share(mask, box) < filters.min_mask_share else None


def white_share(picture: np.ndarray) -> float:
    """Share of the pixels of (H, W, 3) uint8 that are white."""
    return float((picture > WHITE).all(axis=2).mean())


def area_share(box: BoxPx, size: int) -> float:
    """Of the box, as a share of a square of `size` pixels."""
    return (box[2] - box[0]) * (box[3] - box[1]) / size**2


def aspect(box: BoxPx) -> float:
    """Width over height."""
    return (box[2] - box[0]) / max(box[3] - box[1], 1e-6)


def mask_share(mask: np.ndarray, box: BoxPx) -> float:
    """Share of the box that the mask (H, W) covers."""
    x0, y0, x1, y1 = (round(value) for value in box)
    inside = mask[y0:y1, x0:x1]
    return float(inside.mean()) if inside.size else 0.0


def without_overlaps(boxes: Sequence[BoxPx], scores: Sequence[float], max_overlap: float) -> list[int]:
    """Which boxes stay, in their order, when of two that overlap too much the one of lower score goes.

    Overlap is the intersection over the smaller of the two, so that a part inside a whole counts as 1.
    """
    array = np.array(boxes, dtype=float).reshape(-1, 4)
    areas = (array[:, 2:] - array[:, :2]).prod(axis=1)
    overlaps = pairwise_intersection(array, array) / np.maximum(np.minimum.outer(areas, areas), 1e-6)  # (N, N)
    kept: list[int] = []
    for index in np.argsort(-np.array(scores), kind="stable"):
        if not (overlaps[index, kept] > max_overlap).any():
            kept.append(int(index))
    return sorted(kept)
