"""What stays and what goes: pure functions over captions, boxes and masks, with the published values as defaults.

Published values: Ma et al., Subject-Diffusion (arXiv 2307.11410), section 3 and released code: longer side >= 600 px,
3-8 nouns, box threshold 0.25, text threshold 0.2, 2-8 phrases, NMS IoU 0.5. Every drop is counted by its reason.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from data_pipeline.boxes import pairwise_iou
from data_pipeline.record import BoxPx
from data_pipeline.settings import Settings
from data_pipeline.stages import BoxScores


class RuleSettings(Settings):
    """Limits of the filters between the stages."""

    min_longer_side_px: int = Field(600, ge=1)  # of the source picture
    nouns: tuple[int, int] = (3, 8)  # fewest and most noun chunks of a caption
    entities: tuple[int, int] = (2, 8)  # fewest and most entities of a picture, after NMS
    min_token_score: float = Field(0.25, ge=0, le=1)  # a box is kept if the best token of its best chunk has this
    min_chunk_score: float = Field(0.2, ge=0, le=1)  # and the mean of that chunk's tokens this
    nms_iou: float = Field(
        0.5, gt=0, le=1
    )  # of two boxes that overlap more, whatever they are called, the better stays
    min_mask_share: float = Field(0.0, ge=0, le=1)  # of its box that a mask must fill; else the entity goes

    @model_validator(mode="after")
    def _ordered(self) -> RuleSettings:
        for name in ("nouns", "entities"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise ValueError(f"rules.{name}=[{low}, {high}]: expected 0 <= fewest <= most")
        return self


@dataclass(frozen=True)
class FoundBox:
    """A box that was kept, and the noun chunk it shows."""

    chunk: int  # index into the caption's chunks
    box_xyxy_px: BoxPx
    score: float  # of the chunk, 0..1


def count_reason(count: int, limits: tuple[int, int], what: str) -> str | None:
    """too_few_`what` or too_many_`what` if `count` is outside `limits`."""
    if count < limits[0]:
        return f"too_few_{what}"
    return f"too_many_{what}" if count > limits[1] else None


def keep_boxes(scores: BoxScores, rules: RuleSettings) -> list[FoundBox]:
    """Give each box to its best chunk, keep what passes both thresholds, then non-maximum suppression.

    Returns:
        Boxes in falling order of score.
    """
    if not scores.chunk_scores.size:
        return []
    best = scores.chunk_scores.argmax(axis=1)  # (Q,)
    rows = np.arange(len(best))
    chunk, token = scores.chunk_scores[rows, best], scores.token_scores[rows, best]  # (Q,) each
    area = (scores.boxes_xyxy_px[:, 2:] - scores.boxes_xyxy_px[:, :2]).min(axis=1)
    passed = (token >= rules.min_token_score) & (chunk >= rules.min_chunk_score) & (area > 0)
    candidates = np.flatnonzero(passed)
    candidates = candidates[np.argsort(-chunk[candidates], kind="stable")]
    overlaps = pairwise_iou(scores.boxes_xyxy_px[candidates], scores.boxes_xyxy_px[candidates])
    better: list[int] = []  # places among the candidates
    for place in range(len(candidates)):
        if not (overlaps[place, better] > rules.nms_iou).any():
            better.append(place)
    return [
        FoundBox(int(best[i]), tuple(float(v) for v in scores.boxes_xyxy_px[i]), float(chunk[i]))  # type: ignore[arg-type]
        for i in candidates[better]
    ]


def locate(words: str, caption: str) -> tuple[int, int] | None:
    """Characters of the first whole-word occurrence of `words` in the caption, in any case, plural allowed."""
    found = re.search(rf"\b{re.escape(words)}(?:e?s)?\b", caption, re.IGNORECASE)
    return found.span() if found else None


def mask_fills(mask: np.ndarray, box: BoxPx, share: float) -> bool:
    """Whether a mask (H, W) is not empty and fills at least `share` of its box."""
    area = int(mask.sum())
    return area > 0 and area >= share * (box[2] - box[0]) * (box[3] - box[1])
