"""What static and adaptive embedding have in common: a small basis a vector, and one normalised row a layer out of it.

    e_l = LayerNorm_l(a_l B) / sqrt(D) + s_l b_l
B holds vectors that start as the embeddings of init words, and further ones that start small and random (LASR,
github.com/askerlee/AdaFace-dev; its published code, the paper never was). Coefficients a_l come from outside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


def basis_rank(ratio: float, num_init: int, num_negative: int) -> int:
    """Number of basis vectors: round(ratio N + negative + 1), or 2 without init words.

    Raises:
        ValueError: a ratio below 1, which would leave no room beside the init words.
    """
    if num_init == 0:
        return 2 + num_negative
    if ratio < 1:
        raise ValueError(f"rank ratio {ratio}: must be at least 1, each init word takes one basis vector")
    return round(ratio * num_init + num_negative + 1)


class LayerwiseBasis(nn.Module):
    """K bases of r vectors of width D, and norm and bias of every layer.

    Args:
        init_vectors: (N, D) embeddings of init words; N may be 0.
        negative_vectors: (M, D) embeddings of what the word shall stay away from.
        rank: r, from `basis_rank`.
        num_layers: of cross-attention.
        num_vectors: K.
    """

    def __init__(
        self, init_vectors: Tensor, negative_vectors: Tensor, rank: int, num_layers: int, num_vectors: int
    ) -> None:
        super().__init__()
        num_init, width = init_vectors.shape
        extra = functional.normalize(torch.randn(num_vectors, rank - num_init, width), dim=-1) / 4
        extra[:, : len(negative_vectors)] = -negative_vectors.detach().float()
        extra[:, -1] = 0
        initial = init_vectors.detach().float().expand(num_vectors, -1, -1).clone()  # (K, N, D)
        self.register_buffer("initial", initial)  # where the regulariser pulls back to
        self.initial: Tensor
        self.init_vectors = nn.Parameter(initial.clone())  # (K, N, D)
        self.extra_vectors = nn.Parameter(extra)  # (K, r - N, D)
        self.norm_weight = nn.Parameter(torch.ones(num_layers, width))
        self.norm_bias = nn.Parameter(torch.zeros(num_layers, width))
        self.bias = nn.Parameter(torch.zeros(num_layers, num_vectors, width))
        self.bias_scale = nn.Parameter(torch.ones(num_layers, num_vectors, 1))

    @classmethod
    def shaped_like(cls, state: dict[str, Tensor], prefix: str) -> LayerwiseBasis:
        """A basis of the shapes in a state, where its names begin with `prefix`, for `load_state_dict`."""
        num_layers, num_vectors, width = state[f"{prefix}bias"].shape
        num_init = state[f"{prefix}init_vectors"].shape[1]
        rank = num_init + state[f"{prefix}extra_vectors"].shape[1]
        return cls(torch.zeros(num_init, width), torch.zeros(0, width), rank, num_layers, num_vectors)

    @property
    def num_layers(self) -> int:
        return self.bias.shape[0]

    @property
    def num_vectors(self) -> int:
        return self.bias.shape[1]

    @property
    def num_init(self) -> int:
        return self.init_vectors.shape[1]

    @property
    def rank(self) -> int:
        return self.num_init + self.extra_vectors.shape[1]

    def forward(self, coefficients: Tensor) -> Tensor:
        """Rows of all layers, (..., layers, K, r) coefficients -> (..., layers, K, D)."""
        return self.of_all_layers().rows(coefficients)

    def of_all_layers(self) -> LayerwiseRows:
        """What makes rows out of coefficients, put together once for any number of them."""
        vectors = torch.cat([self.init_vectors, self.extra_vectors], dim=1)  # (K, r, D)
        shrink = 1 / math.sqrt(vectors.shape[-1])
        offset = self.norm_bias[:, None] * shrink + self.bias_scale * self.bias  # (layers, K, D)
        return LayerwiseRows(vectors, self.norm_weight * shrink, offset)


@dataclass(frozen=True)
class LayerwiseRows:
    """e_l = LayerNorm(a_l B) weight_l + offset_l."""

    vectors: Tensor  # (K, r, D) B
    weight: Tensor  # (layers, D)
    offset: Tensor  # (layers, K, D)

    def rows(self, coefficients: Tensor) -> Tensor:
        """(..., layers, K, r) -> (..., layers, K, D)."""
        return self._normed(coefficients) * self.weight[:, None] + self.offset

    def rows_of(self, layer: int, coefficients: Tensor) -> Tensor:
        """(..., K, r) of one layer -> (..., K, D)."""
        return torch.addcmul(self.offset[layer], self._normed(coefficients), self.weight[layer])

    def _normed(self, coefficients: Tensor) -> Tensor:
        summed = (coefficients.unsqueeze(-2) @ self.vectors).squeeze(-2)  # (..., K, D)
        return functional.layer_norm(summed, summed.shape[-1:])
