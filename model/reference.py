"""A cut-out as the image encoder sees it: centred, 90 % of the frame, on mid-grey or on a background.

The trainer (random background half of the time) and the pipeline (always mid-grey) share this one function.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from torch import Tensor

MID_GREY = 127
FILL = 0.9  # longer side of the subject as a share of the frame


def prepare_reference(
    cutout: np.ndarray, size: int, background: np.ndarray | None = None, *, fill: float = FILL
) -> Tensor:
    """Crop to the opaque part, keep the aspect, centre.

    Args:
        cutout: (H, W, 4) uint8 RGBA.
        size: side of the result in pixels.
        background: (h, w, 3) uint8, resized to the frame; None is mid-grey.
        fill: longer side of the subject as a share of the frame.
    Returns:
        (3, size, size) float32 in 0..1.
    Raises:
        ValueError: the cut-out has no opaque pixel.
    """
    opaque = cutout[..., 3] > 127
    rows, columns = np.flatnonzero(opaque.any(axis=1)), np.flatnonzero(opaque.any(axis=0))
    if not len(rows):
        raise ValueError("the cut-out is empty: no pixel is opaque; give another image or mask")
    part: np.ndarray = cutout[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32) / 255
    part[..., :3] *= part[..., 3:]  # premultiplied, so that resizing does not bleed hidden colours into the edge
    scale = fill * size / max(part.shape[:2])
    height, width = max(1, round(part.shape[0] * scale)), max(1, round(part.shape[1] * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    part = cv2.resize(part, (width, height), interpolation=method).clip(0, 1)
    if background is None:
        frame: np.ndarray = np.full((size, size, 3), MID_GREY / 255, np.float32)
    else:
        frame = cv2.resize(background, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    top, left = (size - height) // 2, (size - width) // 2
    region = frame[top : top + height, left : left + width]
    region *= 1 - part[..., 3:]
    region += part[..., :3]
    return torch.from_numpy(frame.transpose(2, 0, 1).clip(0, 1).copy())  # (3, size, size)
