"""Overlaps of boxes, each with each: xyxy arrays, in whatever unit both are in."""

from __future__ import annotations

import numpy as np


def pairwise_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (N, 4) with boxes (M, 4): (N, M)."""
    shared = pairwise_intersection(first, second)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (first, second)]
    return shared / np.maximum(areas[0][:, None] + areas[1] - shared, 1e-9)


def pairwise_intersection(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Shared area of boxes (N, 4) with boxes (M, 4): (N, M)."""
    low = np.maximum(first[:, None, :2], second[:, :2])
    high = np.minimum(first[:, None, 2:], second[:, 2:])
    return (high - low).clip(min=0).prod(axis=2)
