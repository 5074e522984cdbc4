"""From image features to subject tokens and concepts (Subject-Diffusion, arXiv 2307.11410, section 3.3).

Patch tokens, joined with Fourier features of the subject's box in the picture to be drawn, become the tokens that the
fusers attend to; the pooled vector becomes the concept that stands for the subject in the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NUM_BANDS = 8
TEMPERATURE = 100.0
BOX_FEATURES = NUM_BANDS * 2 * 4  # sine and cosine of xyxy in each band


def fourier_box_features(boxes: Tensor) -> Tensor:
    """(…, 4) xyxy fractions -> (…, 64): sin and cos of 100^(k/8) · xyxy, k = 0..7 (GLIGEN, appendix)."""
    bands = TEMPERATURE ** (torch.arange(NUM_BANDS, device=boxes.device, dtype=boxes.dtype) / NUM_BANDS)
    angles = bands[:, None] * boxes[..., None, :]  # (…, 8, 4)
    return torch.stack([angles.sin(), angles.cos()], dim=-2).flatten(-3)


class Projection(nn.Sequential):
    """LayerNorm -> Linear -> GELU -> Linear; (…, width_in) -> (…, width_out)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(
            nn.LayerNorm(width_in), nn.Linear(width_in, width_out), nn.GELU(), nn.Linear(width_out, width_out)
        )


class GroundingNetwork(nn.Module):
    """Patch tokens and boxes -> subject tokens."""

    def __init__(self, patch_dim: int, context_dim: int) -> None:
        super().__init__()
        self.null_box = nn.Parameter(torch.zeros(BOX_FEATURES))
        self.project = Projection(patch_dim + BOX_FEATURES, context_dim)

    def forward(self, patches: Tensor, boxes: Tensor, box_keep: Tensor) -> Tensor:
        """Subject tokens (B, S, R, T, D).

        Args:
            patches: (B, S, R, T, W) patch tokens.
            boxes: (B, S, 4) xyxy as fractions of the picture to be drawn.
            box_keep: (B, S) bool; False gives the learned null box feature.
        """
        patches = patches.to(self.null_box.dtype)
        known = fourier_box_features(boxes.float()).to(patches.dtype)  # (B, S, 64)
        features = torch.where(box_keep[..., None], known, self.null_box)  # (B, S, 64)
        features = features[:, :, None, None].expand(*patches.shape[:4], -1)  # (B, S, R, T, 64)
        return self.project(torch.cat([patches, features], dim=-1))
