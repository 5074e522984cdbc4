"""The adaptive part of LASR: a row that follows what a cross-attention layer sees, and the time.

    f = pool(x), t = time embedding[: share C], a = W_l [LN f; LN t] + c_l, e = LayerNorm_l(a B) / sqrt(D) + s_l b_l
x is what enters layer l (its normalised input) and takes no gradient: nothing is learnt through the UNet. The row goes
through the text encoder in the prompt; `layer_contexts.py` calls this for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.nn import functional

from model.lasr.layerwise_basis import LayerwiseBasis, LayerwiseRows
from model.lasr.pooling import AttentionPool, average_pool

AVERAGE_TIME_SHARE = 0.5
ATTENTION_TIME_SHARE = 0.25


class AdaptiveEmbedding(nn.Module):
    """Rows (B, K, D) of a word in one layer.

    Args:
        basis: its own, not that of the static embedding.
        widths: channels of each layer (`layer_contexts.layer_widths`).
        time_width: of the UNet's time embedding.
        inner_widths: of each layer's queries; given for attention pooling, None pools by plain average.
    """

    def __init__(
        self,
        basis: LayerwiseBasis,
        widths: Sequence[int],
        time_width: int,
        inner_widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if len(widths) != basis.num_layers:
            raise ValueError(f"adaptive embedding: {len(widths)} layers, its basis has {basis.num_layers}")
        attention = inner_widths is not None
        share = ATTENTION_TIME_SHARE if attention else AVERAGE_TIME_SHARE
        pooled = [2 * width if attention else width for width in widths]
        times = [min(int(share * width), time_width) for width in widths]
        coefficients = basis.num_vectors * basis.rank
        self.basis = basis
        self.time_norms = nn.ModuleList(nn.LayerNorm(time) for time in times)
        self.feature_norms = nn.ModuleList(nn.LayerNorm(width) for width in pooled)
        self.maps = nn.ModuleList(
            nn.Linear(width + time, coefficients) for width, time in zip(pooled, times, strict=True)
        )
        self.pools = nn.ModuleList(
            AttentionPool(width, inner) for width, inner in zip(widths, inner_widths or (), strict=attention)
        )

    @classmethod
    def shaped_like(cls, state: dict[str, Tensor]) -> AdaptiveEmbedding:
        """An embedding of the shapes of a state, for `load_state_dict`."""
        basis = LayerwiseBasis.shaped_like(state, "basis.")
        layers = range(basis.num_layers)
        times = [state[f"time_norms.{layer}.weight"].shape[0] for layer in layers]
        pooled = [state[f"feature_norms.{layer}.weight"].shape[0] for layer in layers]
        attention = "pools.0.query" in state
        inner = [state[f"pools.{layer}.query"].shape[:2].numel() for layer in layers] if attention else None
        widths = [width // 2 for width in pooled] if attention else pooled
        return cls(basis, widths, max(times), inner)

    @property
    def looks(self) -> bool:
        """Whether it pools by attention, and so needs the static row and the layer."""
        return len(self.pools) > 0

    def pool(self, layer: int, features: Tensor, weights: Tensor | None, rows: Tensor, attention: Attention) -> Tensor:
        """One feature a picture.

        Args:
            features: (B, T, C) what enters the layer.
            weights: (B, T) how much of each token counts, or None.
            rows: (K, D) static rows of the word, and `attention`, the layer itself: for attention pooling.
        Returns:
            (B, C), or (B, 2 C) with attention pooling.
        """
        features = features.detach().float()
        if not self.looks:
            return average_pool(features, weights)
        pool = self.pools[layer]
        assert isinstance(pool, AttentionPool)
        return pool(features, weights, rows.detach(), attention)

    def of_all_layers(self) -> AdaptiveRows:
        """What makes rows out of features and time, put together once for any number of passes.

        The affine part of each norm goes into the map behind it. Times of all layers are padded to one width, so that
        one product a pass serves all of them.
        """
        longest = max(norm.weight.shape[0] for norm in self.time_norms)
        feature_maps, time_maps, biases = [], [], []
        for seen, when, map_ in zip(self.feature_norms, self.time_norms, self.maps, strict=True):
            width = seen.weight.shape[0]
            of_feature, of_time = map_.weight.split([width, when.weight.shape[0]], dim=1)  # (K r, F), (K r, times)
            feature_maps.append(of_feature * seen.weight)
            time_maps.append(functional.pad(of_time * when.weight, (0, longest - of_time.shape[1])))
            biases.append(map_.bias + of_feature @ seen.bias + of_time @ when.bias)  # (K r,)
        widths = tuple(norm.weight.shape[0] for norm in self.time_norms)
        return AdaptiveRows(
            widths, torch.stack(time_maps), torch.stack(biases), tuple(feature_maps), self.basis.of_all_layers()
        )

    def forward(self, layer: int, pooled: Tensor, time: Tensor) -> Tensor:
        """Rows of one layer from a pooled feature.

        Args:
            pooled: (B, C or 2 C) from `pool`.
            time: (B, width) the UNet's time embedding.
        Returns:
            (B, K, D).
        """
        made = self.of_all_layers()
        return made(layer, pooled, made.of_time(time))


@dataclass(frozen=True)
class AdaptiveRows:
    """a = W_l [LN f; LN t] + c_l, e = LayerNorm_l(a B) / sqrt(D) + s_l b_l, with all that stays put in its place."""

    time_widths: tuple[int, ...]  # a layer
    time_maps: Tensor  # (layers, K r, longest time)
    biases: Tensor  # (layers, K r)
    feature_maps: tuple[Tensor, ...]  # (K r, F) a layer
    basis: LayerwiseRows

    def of_time(self, time: Tensor) -> Tensor:
        """What the time says to each layer: (B, width) -> (layers, B, K r)."""
        time = time.detach().float()
        longest = self.time_maps.shape[-1]
        normed = {
            width: functional.pad(functional.layer_norm(time[:, :width], (width,)), (0, longest - width))
            for width in set(self.time_widths)
        }
        by_layer = torch.stack([normed[width] for width in self.time_widths])  # (layers, B, longest time)
        return torch.baddbmm(self.biases[:, None], by_layer, self.time_maps.mT)

    def __call__(self, layer: int, pooled: Tensor, told: Tensor) -> Tensor:
        """Rows of one layer.

        Args:
            pooled: (B, F) from `AdaptiveEmbedding.pool`.
            told: (layers, B, K r) from `of_time`.
        Returns:
            (B, K, D).
        """
        seen = functional.layer_norm(pooled, pooled.shape[-1:])
        coefficients = torch.addmm(told[layer], seen, self.feature_maps[layer].T)  # (B, K r)
        return self.basis.rows_of(layer, coefficients.view(len(pooled), len(self.basis.vectors), -1))
