"""Masks by GrabCut (Rother, Kolmogorov, Blake, SIGGRAPH 2004) in OpenCV: for machines without weights.

Each box is cut out of a small crop around it: what lies outside of it is background for certain, an ellipse a little
larger than the one inscribed in it is probably the thing, its corners probably not. Colours are all that GrabCut sees:
it does well on things that stand out from what is around them, and no better than the ellipse on those that do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from data_pipeline.record import BoxPx, Provenance
from data_pipeline.settings import Settings
from data_pipeline.stages import Picture

ELLIPSE = 1.2  # half axes of what is probably the thing, as a multiple of the box's half sides; found on the toybox
MIN_BACKGROUND = 32  # pixels; fewer outside of the box tell nothing of the background's colours
MIN_ISLAND_SHARE = 0.05  # of the largest connected part: smaller parts are dropped
MIN_SHARE = 0.02  # of the box: GrabCut has found nothing if it leaves less
NUM_COLOURS = 5  # of each side, in OpenCV; fewer pixels than that cannot be clustered
SEED = 0  # of the clustering of colours
WholeBox = tuple[int, int, int, int]  # xyxy on whole pixels, the far edges exclusive


class GrabCutSettings(Settings):
    """GrabCut through OpenCV; needs no weights and no accelerator."""

    backend: Literal["grabcut"] = "grabcut"
    batch_size: int = Field(16, ge=1)  # pictures at once; decides nothing but the grain of the work
    iterations: int = Field(2, ge=1)  # of colours -> cut -> colours; measured on the toybox: 4 are no better than 2
    margin: float = Field(0.3, gt=0, le=2)  # of the box's longer side: width of the background looked at around it
    side: int = Field(160, ge=32)  # pixels; larger crops are scaled down to it, time grows with the area

    def load(self, device: str) -> GrabCutSegmenter:
        """The segmenter; `device` is not used."""
        return GrabCutSegmenter(self)


class GrabCutSegmenter:
    """Cuts out what differs in colour from what is around its box.

    A mask lies inside its box and is never empty: where GrabCut finds nothing it is the ellipse inscribed in the box.
    Other boxes need no word of their own: outside of the box all is background, and where two overlap, colours tell.
    """

    def __init__(self, settings: GrabCutSettings) -> None:
        import cv2

        self.provenance = Provenance("grabcut", "opencv", cv2.__version__)
        self.settings = settings

    def segment(self, pictures: Sequence[Picture], boxes: Sequence[Sequence[BoxPx]]) -> list[np.ndarray]:
        return [self._of_picture(picture, given) for picture, given in zip(pictures, boxes, strict=True)]

    def _of_picture(self, picture: Picture, boxes: Sequence[BoxPx]) -> np.ndarray:
        height, width = picture.shape[:2]
        masks = np.zeros((len(boxes), height, width), bool)  # (N, H, W)
        for mask, box in zip(masks, boxes, strict=True):
            x0, y0, x1, y1 = whole_pixels(box, width, height)
            mask[y0:y1, x0:x1] = cut_box(picture, (x0, y0, x1, y1), self.settings)
        return masks


def whole_pixels(box: BoxPx, width: int, height: int) -> WholeBox:
    """The box on whole pixels: inside the picture, at least one pixel large."""
    x0, y0 = min(max(round(box[0]), 0), width - 1), min(max(round(box[1]), 0), height - 1)
    return x0, y0, min(max(round(box[2]), x0 + 1), width), min(max(round(box[3]), y0 + 1), height)


def cut_box(picture: Picture, box: WholeBox, settings: GrabCutSettings) -> np.ndarray:
    """What stands in the box, (y1 - y0, x1 - x0) bool, not empty."""
    import cv2

    x0, y0, x1, y1 = box
    height, width = picture.shape[:2]
    around = math.ceil(settings.margin * max(x1 - x0, y1 - y0))
    left, top = max(x0 - around, 0), max(y0 - around, 0)
    crop = picture[top : min(y1 + around, height), left : min(x1 + around, width)]
    scale = min(1.0, settings.side / max(crop.shape[:2]))
    size = max(1, round(crop.shape[1] * scale)), max(1, round(crop.shape[0] * scale))
    small = np.ascontiguousarray(crop) if scale == 1 else cv2.resize(crop, size, interpolation=cv2.INTER_AREA)
    ratios = size[0] / crop.shape[1], size[1] / crop.shape[0]
    inside, distance = _ellipse((x0 - left, y0 - top, x1 - left, y1 - top), ratios, small.shape[:2])

    cut = _without_specks(_grabcut(small, inside, distance, settings.iterations))
    if np.count_nonzero(cut) < MIN_SHARE * np.count_nonzero(inside):
        cut = inside & (distance <= 1)
    if scale < 1:
        cut = cv2.resize(cut.astype(np.float32), crop.shape[1::-1], interpolation=cv2.INTER_LINEAR) >= 0.5
    found = cut[y0 - top : y1 - top, x0 - left : x1 - left]
    return found if found.any() else np.ones_like(found)  # too thin for an ellipse to hold a pixel's middle


def _ellipse(box: WholeBox, ratios: tuple[float, float], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels of a crop lie in the box, and how far they are from its middle.

    Args:
        box: in pixels of the crop before it was scaled by `ratios` (x, y).
        shape: height and width of the scaled crop.
    Returns:
        (h, w) bool and (h, w) float: 1 is the ellipse inscribed in the box.
    """
    x0, y0, x1, y1 = box[0] * ratios[0], box[1] * ratios[1], box[2] * ratios[0], box[3] * ratios[1]
    y, x = np.ogrid[: shape[0], : shape[1]]
    x, y = x + 0.5, y + 0.5  # the middles of the pixels
    distance = np.hypot((2 * x - x0 - x1) / (x1 - x0), (2 * y - y0 - y1) / (y1 - y0))
    # A pixel that the box only touches is in it: scaled down, a thin box would otherwise lose its sides.
    inside = (x + 0.5 > x0) & (x - 0.5 < x1) & (y + 0.5 > y0) & (y - 0.5 < y1)
    return inside, distance


def _grabcut(pixels: np.ndarray, inside: np.ndarray, distance: np.ndarray, iterations: int) -> np.ndarray:
    """(h, w) bool; all False where there is too little to tell colours apart by."""
    import cv2

    likely = inside & (distance <= ELLIPSE)
    seeds = np.where(likely, cv2.GC_PR_FGD, np.where(inside, cv2.GC_PR_BGD, cv2.GC_BGD)).astype(np.uint8)
    if np.count_nonzero(~inside) < MIN_BACKGROUND:
        seeds[inside & ~likely] = cv2.GC_BGD  # the box fills the picture: its corners are the best guess there is
    if min(np.count_nonzero(likely), np.count_nonzero(~likely)) < NUM_COLOURS:
        return np.zeros_like(inside)
    cv2.setRNGSeed(SEED)  # for each box, or a mask would depend on the boxes before it
    colours = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(pixels, seeds, None, *colours, iterations, cv2.GC_INIT_WITH_MASK)  # type: ignore[call-overload]
    return (seeds == cv2.GC_FGD) | (seeds == cv2.GC_PR_FGD)


def _without_specks(cut: np.ndarray) -> np.ndarray:
    """Without connected parts that are far smaller than the largest."""
    import cv2

    count, labels, sizes, _ = cv2.connectedComponentsWithStats(cut.astype(np.uint8), connectivity=8)
    if count <= 2:
        return cut
    areas = sizes[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0  # what is not cut
    return (areas >= MIN_ISLAND_SHARE * areas.max())[labels] & cut
