"""Boxes of things that stand out from their surroundings, from the pixels alone: no network, no training.

What a picture's rim shows is mostly background (the boundary prior of Wei et al., ECCV 2012, and Zhu et al., CVPR
2014). So: colours that are frequent on the rim, and the usual colour of each row (sky above, ground below), then the
distance of every pixel to them, cut at several levels, and the boxes of connected pieces. A box that many cuts agree
on comes first, as stable regions do in Matas et al., MSER (BMVC 2002).
"""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

from data_pipeline.boxes import pairwise_iou
from data_pipeline.stages import Picture

WORKING_SIDE = 128  # pixels, longer side of the copy that is looked at
RIM = 0.05  # its width, share of the side
RIM_COLOURS = 12
RIM_SHARES = (0.02, 0.06, 0.15)  # a colour is background from this share of the rim on: a thing may touch it, too
LEVELS = (8, 12, 17, 24, 34, 48)  # distances in CIELAB as OpenCV scales it to bytes
OPENINGS = (3, 9)  # discs: the larger one parts things that touch, or stand on their shadows
SMALLEST_SIDE, LARGEST_AREA, LEAST_FILL = 0.12, 0.75, 0.15  # longer side, box and filled part of it, as shares
SAME_BOX_IOU = 0.75


def propose_boxes(picture: Picture, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to `limit` boxes of a (H, W, 3) picture, the most stable ones first.

    Returns:
        (Q, 4) float32 xyxy in pixels, and (Q,) float32 stability: the share of cuts that show this box.
    """
    height, width = picture.shape[:2]
    scale = WORKING_SIDE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = cv2.medianBlur(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), 3)
    lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB).astype(np.float32)  # (h, w, 3)
    maps = _distances(lab)
    found = [
        box
        for distance in maps
        for level in LEVELS
        for opening in OPENINGS
        for box in _pieces(distance > level, opening)
    ]
    boxes, votes = _most_stable(np.asarray(found, np.float32).reshape(-1, 4), limit)
    stability = (votes / (len(maps) * len(LEVELS) * len(OPENINGS))).clip(max=1).astype(np.float32)
    far = np.array([width, height, width, height], np.float32)
    return np.clip(boxes * (far / np.array([*size, *size], np.float32)), 0, far).astype(np.float32), stability


def _distances(lab: np.ndarray) -> list[np.ndarray]:
    """Maps (h, w) of how far each pixel's colour is from the background's, for several notions of background."""
    rim = max(2, round(min(lab.shape[:2]) * RIM))
    on_rim = np.ones(lab.shape[:2], bool)
    on_rim[rim:-rim, rim:-rim] = False
    samples = np.ascontiguousarray(lab[on_rim])  # (R, 3)
    cv2.setRNGSeed(0)  # equal pictures give equal boxes
    criteria = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 10, 1.0)
    count = min(RIM_COLOURS, len(samples))
    _, labels, colours = cv2.kmeans(samples, count, None, criteria, 1, cv2.KMEANS_PP_CENTERS)  # type: ignore[call-overload]
    shares = np.bincount(labels.ravel(), minlength=count) / len(samples)  # (K,)
    flat = lab.reshape(-1, 3)
    squared = (flat**2).sum(axis=1)[:, None] - 2 * flat @ colours.T + (colours**2).sum(axis=1)  # (h·w, K)
    maps = []
    for share in RIM_SHARES:
        common = shares >= min(share, shares.max())
        maps.append(np.sqrt(squared[:, common].min(axis=1).clip(min=0)).reshape(lab.shape[:2]))
    return [*maps, np.sqrt(((lab - np.median(lab, axis=1, keepdims=True)) ** 2).sum(axis=2))]


def _pieces(mask: np.ndarray, opening: int) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of the connected pieces of a mask (h, w), after the removal of all that is thinner than `opening`."""
    height, width = mask.shape
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (opening, opening))
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, disc)
    _, _, pieces, _ = cv2.connectedComponentsWithStats(opened, connectivity=4)
    for x, y, w, h, area in pieces[1:].tolist():
        large = max(w, h) >= SMALLEST_SIDE * max(width, height) and w * h <= LARGEST_AREA * width * height
        if large and area >= LEAST_FILL * w * h:
            yield x, y, x + w, y + h


def _most_stable(boxes: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) that nearly agree become their median, (Q, 4), with their votes (Q,); most votes come first."""
    agree = pairwise_iou(boxes, boxes)  # (N, N)
    votes = np.where(agree > SAME_BOX_IOU, agree, 0).sum(axis=1)
    free = np.ones(len(boxes), bool)
    chosen: list[np.ndarray] = []
    count: list[float] = []
    for index in np.argsort(-votes, kind="stable"):
        if len(chosen) == limit:
            break
        if free[index]:
            group = agree[index] > SAME_BOX_IOU
            chosen.append(np.median(boxes[group], axis=0))
            count.append(float(votes[index]))
            free &= ~group
    return np.asarray(chosen, np.float32).reshape(-1, 4), np.asarray(count, np.float32)


def cut_regions(picture: Picture, boxes: np.ndarray, size: int, margin: float) -> np.ndarray:
    """Square crops around boxes (N, 4), (N, size, size, 3) uint8; beyond the picture its edge goes on.

    Args:
        margin: of the longer side, how much more than the box is seen.
    """
    crops = np.empty((len(boxes), size, size, 3), np.uint8)
    for crop, (x0, y0, x1, y1) in zip(crops, boxes.tolist(), strict=True):
        scale = size / (max(x1 - x0, y1 - y0, 1.0) * (1 + margin))
        shrink = max(1, int(1 / scale))  # averaged down first, or thin parts would be lost between the samples
        source = picture
        if shrink > 1:
            source = cv2.resize(picture, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA)
        centre = (x0 + x1) / 2, (y0 + y1) / 2
        matrix = np.array(
            [[scale * shrink, 0, size / 2 - centre[0] * scale], [0, scale * shrink, size / 2 - centre[1] * scale]]
        )
        cv2.warpAffine(source, matrix, (size, size), dst=crop, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return crops
