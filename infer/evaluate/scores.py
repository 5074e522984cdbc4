"""Scores as pure functions of codes and boxes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Box = tuple[float, float, float, float]


def found_first(code: Tensor, gallery: Tensor) -> bool:
    """Whether row 0 of the gallery (N, D), the true subject, is nearer to the code (D,) than every other row."""
    similarity = gallery @ code  # (N,)
    return bool(similarity[0] > similarity[1:].max())


def box_iou(first: Box, second: Box) -> float:
    """Intersection over union of two xyxy boxes, 0..1."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    both = max(width, 0.0) * max(height, 0.0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return both / (areas - both) if both > 0 else 0.0


def placement(asked: Sequence[Box], seen: Sequence[Box]) -> float:
    """Mean over asked boxes of the IoU with the best box seen; each seen box serves one asked box, best pair first."""
    pairs = sorted(((box_iou(a, s), i, j) for i, a in enumerate(asked) for j, s in enumerate(seen)), reverse=True)
    total, used_asked, used_seen = 0.0, set[int](), set[int]()
    for overlap, i, j in pairs:
        if i not in used_asked and j not in used_seen:
            total, used_asked, used_seen = total + overlap, used_asked | {i}, used_seen | {j}
    return total / len(asked)
