"""Boxes as rasters: where a subject may be seen, and the location mask that is added to the UNet's input.

The published model appends the mask as a fifth input channel (Subject-Diffusion, arXiv 2307.11410). A convolution of
the mask, added to what `conv_in` makes of the latents, is the same sum and leaves the UNet's own channels as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rasterise_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Which cells of a grid lie in each box.

    A cell is covered when its centre is inside; the cell in the middle of the box always is, so that no box vanishes.

    Args:
        boxes: (..., 4) xyxy as fractions of the picture, 0..1.
        size: (h, w) cells.
    Returns:
        (..., h, w) bool.
    """
    boxes = boxes.float()
    rows = _covered(boxes[..., 1], boxes[..., 3], size[0])  # (..., h)
    columns = _covered(boxes[..., 0], boxes[..., 2], size[1])  # (..., w)
    return rows[..., :, None] & columns[..., None, :]


def _covered(start: Tensor, end: Tensor, cells: int) -> Tensor:
    index = torch.arange(cells, device=start.device)  # (cells,)
    centre = (index + 0.5) / cells
    middle = ((start + end) / 2 * cells).long().clamp(0, cells - 1)  # (...)
    inside = (centre >= start[..., None]) & (centre < end[..., None])  # (..., cells)
    return inside | (index == middle[..., None])


def location_mask(boxes: Tensor, keep: Tensor, size: tuple[int, int]) -> Tensor:
    """Product over subjects of (1 - filled box).

    Args:
        boxes: (B, S, 4) xyxy as fractions of the picture, 0..1.
        keep: (B, S) bool, False where a subject is absent or the place is not known.
        size: (h, w) of the latents.
    Returns:
        (B, 1, h, w) float32: 0 inside boxes, 1 outside; 0 everywhere in rows without any kept box (the null location).
    """
    inside = rasterise_boxes(boxes, size) & keep[:, :, None, None]  # (B, S, h, w)
    outside = ~inside.any(dim=1, keepdim=True) & keep.any(dim=1)[:, None, None, None]  # (B, 1, h, w)
    return outside.float()


def grid_of_tokens(num_tokens: int, latent_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a UNet level with `num_tokens` image tokens: the latent size halved as often as needed.

    Raises:
        ValueError: no level of the UNet has so many tokens.
    """
    height, width = latent_size
    while height * width > num_tokens:
        height, width = (height + 1) // 2, (width + 1) // 2  # stride-2 convolutions round up
    if height * width != num_tokens:
        raise ValueError(f"{num_tokens} image tokens: latents of {latent_size[0]}x{latent_size[1]} have no such level")
    return height, width


class LocationConvolution(nn.Conv2d):
    """3x3 convolution of the location mask, (B, 1, h, w) -> (B, C, h, w); no bias, zero at the start."""

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels, kernel_size=3, padding=1, bias=False)
        self.weight.data.zero_()
