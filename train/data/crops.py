"""Subjects cut from pictures by their boxes, as the identity judge is trained on them and later shown them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MARGIN = 1.1  # side of the crop as a multiple of the box's longer side


def crop_to_boxes(pictures: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Square crops around boxes, resampled without a whole-pixel grid; beyond the picture its edge goes on.

    Args:
        pictures: (N, 3, H, H).
        boxes: (N, 4) xyxy as fractions of the picture.
    Returns:
        (N, 3, size, size).
    """
    centre = (boxes[:, :2] + boxes[:, 2:]) - 1  # (N, 2) in -1..1
    half = MARGIN * (boxes[:, 2:] - boxes[:, :2]).amax(dim=1, keepdim=True).clamp(min=1e-3)  # (N, 1) likewise
    steps = (torch.arange(size, device=boxes.device, dtype=boxes.dtype) + 0.5) / size * 2 - 1  # (size,)
    x, y = centre[:, :1] + half * steps, centre[:, 1:] + half * steps  # (N, size) each
    shape = (-1, size, size)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=-1)  # (N, size, size, 2)
    return functional.grid_sample(pictures, grid.to(pictures.dtype), padding_mode="border", align_corners=False)
