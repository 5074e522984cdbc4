"""One feature a picture out of what enters a cross-attention layer: plain or attention pooling over the valid region.

Average pooling is LASR's. Attention pooling came with its successor AdaPrompt (github.com/askerlee/AdaFace-dev, 2023):
the word's static row asks, through the layer's own projections, where in the picture the subject is; what is there and
what is not become two features.
"""

from __future__ import annotations

import math

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from model.subject_adapter.location import grid_of_tokens

HEADS = 8
HEAD_WIDTH = 8  # 64 numbers in all


def token_weights(valid: Tensor, num_tokens: int) -> Tensor:
    """How much of each token's cell is valid: (B, 1, h, w) -> (B, T), 0..1."""
    size = grid_of_tokens(num_tokens, (valid.shape[-2], valid.shape[-1]))
    return functional.adaptive_avg_pool2d(valid.float(), size).flatten(1)  # (B, T)


def average_pool(features: Tensor, weights: Tensor | None) -> Tensor:
    """Mean over tokens of (B, T, C), weighted by (B, T) where given: (B, C)."""
    if weights is None:
        return features.mean(dim=1)
    return torch.einsum("btc,bt->bc", features, weights) / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)


class AttentionPool(nn.Module):
    """Foreground and background of a layer's input, as the static row sees them.

    Args:
        width: C, channels of the layer; a multiple of 8.
        inner: width of the layer's queries and keys; a multiple of 8.
    """

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        if width % HEADS or inner % HEADS:
            raise ValueError(f"attention pooling: {width} channels, {inner} in attention; needs multiples of {HEADS}")
        group = inner // HEADS
        # Grouped low-rank maps: each head looks at its own share of the layer's query and key.
        self.query = nn.Parameter(torch.randn(HEADS, group, HEAD_WIDTH) / math.sqrt(group))
        self.key = nn.Parameter(torch.randn(HEADS, group, HEAD_WIDTH) / math.sqrt(group))
        self.value_norm = nn.LayerNorm(width)
        self.foreground_norm = nn.LayerNorm(width)
        self.background_norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, weights: Tensor | None, rows: Tensor, layer: Attention) -> Tensor:
        """Pool what enters a layer.

        Args:
            features: (B, T, C).
            weights: (B, T) valid shares, or None.
            rows: (K, D) static rows of the word, their mean asks; they take no gradient from here.
            layer: the cross-attention layer, whose projections of queries and keys are used as they are.
        Returns:
            (B, 2 C): foreground, background.
        """
        dtype = layer.to_k.weight.dtype
        with torch.no_grad():
            asked = layer.to_k(rows.mean(dim=0).to(dtype)).float()  # (inner,)
            offered = layer.to_q(features.to(dtype)).float()  # (B, T, inner)
        query = torch.einsum("hg,hgd->hd", asked.view(HEADS, -1), self.query)  # (H, d)
        key = torch.einsum("bthg,hgd->bhtd", offered.unflatten(-1, (HEADS, -1)), self.key)  # (B, H, T, d)
        logits = torch.einsum("hd,bhtd->bht", query, key) / math.sqrt(HEAD_WIDTH)
        if weights is not None:
            logits = logits + weights.clamp(min=1e-6).log()[:, None]
        values = self.value_norm(features.float())  # (B, T, C)
        looked = torch.einsum("bht,bthc->bhc", logits.softmax(dim=-1), values.unflatten(-1, (HEADS, -1))).flatten(1)
        rest = average_pool(values, weights) - looked  # (B, C)
        return torch.cat([self.foreground_norm(looked), self.background_norm(rest)], dim=-1)
