"""Where each patch of a reference would lie in the picture to be drawn, so that fusers can look it up by place.

The published adapter tells every token the box of its whole subject; which patch belongs at which end of the box is
left to be found out, and that takes long. Here a query carries Fourier features of its own cell, and the key of a patch
those of the cell where it would land if the reference were laid into the box. Both go through one linear map, so that
their product is a learned function of the distance between the two (Tancik et al., arXiv 2006.10739, section 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.reference import FILL


def patch_boxes(boxes: Tensor, num_patches: int, latent_size: tuple[int, int]) -> Tensor:
    """Cut a square frame, whose subject fills the box, into its patches.

    Args:
        boxes: (..., 4) xyxy of the subject as fractions of the picture.
        num_patches: T, a square number; row by row.
        latent_size: (h, w) of the picture's latents, for its aspect ratio.
    Returns:
        (..., T, 4) xyxy as fractions of the picture; patches of the frame's margin may lie outside it.
    Raises:
        ValueError: the patches form no square.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"patch places: {num_patches} patches form no square; leave `patch_places` off")
    height, width = latent_size
    corner, far = boxes[..., :2], boxes[..., 2:]  # (..., 2)
    picture = torch.tensor([width, height], device=boxes.device, dtype=boxes.dtype)  # cells in x and y
    frame = ((far - corner) * picture).amax(dim=-1, keepdim=True) / FILL / picture  # (..., 2) the frame's side
    edges = torch.arange(side + 1, device=boxes.device, dtype=boxes.dtype) / side - 0.5  # (side + 1,)
    lines = ((corner + far) / 2)[..., None] + frame[..., None] * edges  # (..., 2, side + 1)
    return _cells(lines[..., 0, :], lines[..., 1, :])


def cell_boxes(size: tuple[int, int], device: torch.device) -> Tensor:
    """(h, w) -> (h·w, 4): xyxy of each cell of a grid over the whole picture, row by row."""
    rows, columns = (torch.arange(count + 1, device=device) / count for count in size)
    return _cells(columns, rows)


def _cells(columns: Tensor, rows: Tensor) -> Tensor:
    """(..., w + 1) and (..., h + 1) grid lines -> (..., h·w, 4)."""
    height, width = rows.shape[-1] - 1, columns.shape[-1] - 1

    def across(values: Tensor) -> Tensor:
        return values[..., None, :].expand(*values.shape[:-1], height, width)

    def down(values: Tensor) -> Tensor:
        return values[..., :, None].expand(*values.shape[:-1], height, width)

    sides = (across(columns[..., :-1]), down(rows[..., :-1]), across(columns[..., 1:]), down(rows[..., 1:]))
    return torch.stack(sides, dim=-1).flatten(-3, -2)
