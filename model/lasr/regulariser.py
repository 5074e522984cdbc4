"""The regulariser of LASR: keeps bases, biases and maps small, and init vectors near the words they come from.

Mean squares with the published weights; those of bias and basis grow with their own size (0.1 times the mean norm to
the power 1.5) and take no gradient (LASR, github.com/askerlee/AdaFace-dev). Its weight in the loss is 0.05.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.lasr.adaptive_embedding import AdaptiveEmbedding
from model.lasr.layerwise_basis import LayerwiseBasis
from model.lasr.static_embedding import StaticEmbedding

STATIC_BOOST = 5.0
ADAPTIVE_BOOST = 10.0
DYNAMIC_WEIGHT = 0.1
DYNAMIC_POWER = 1.5
INIT_WEIGHT = 0.1
SMALL_SCALE_WEIGHT = 1e-4
MAP_WEIGHT = 1.0
MAP_BIAS_WEIGHT = 0.01


def lasr_regulariser(static: StaticEmbedding, adaptive: AdaptiveEmbedding | None = None) -> Tensor:
    """5 times the static part and 10 times the adaptive part: scalar."""
    loss = STATIC_BOOST * basis_penalty(static.basis)
    if adaptive is None:
        return loss
    maps = [module for module in adaptive.maps if isinstance(module, nn.Linear)]
    weights = torch.stack([module.weight.square().mean() for module in maps]).sum()
    biases = torch.stack([module.bias.square().mean() for module in maps]).sum()
    penalty = basis_penalty(adaptive.basis) + MAP_WEIGHT * weights + MAP_BIAS_WEIGHT * biases
    return loss + ADAPTIVE_BOOST * penalty


def basis_penalty(basis: LayerwiseBasis) -> Tensor:
    """Bias, bias scales, basis and drift of the init vectors, weighted: scalar."""
    scales, width = basis.bias_scale, basis.bias.shape[-1]
    # Scales below 1 are hardly held back: they would be driven to 0 slowly and for good.
    large = scales > 1
    scale_penalty = _mean_square(scales, large) + SMALL_SCALE_WEIGHT * _mean_square(scales, ~large)
    return (
        _own_size_weight(basis.bias) * _mean_square(basis.bias)
        + scale_penalty / width
        + _own_size_weight(basis.extra_vectors) * _mean_square(basis.extra_vectors)
        + INIT_WEIGHT * _mean_square(basis.init_vectors - basis.initial)
    )


def _own_size_weight(vectors: Tensor) -> Tensor:
    return DYNAMIC_WEIGHT * vectors.detach().norm(dim=-1).mean() ** DYNAMIC_POWER


def _mean_square(values: Tensor, where: Tensor | None = None) -> Tensor:
    """Over all values, or the chosen ones; 0 for none at all."""
    if where is None:
        return values.square().sum() / max(values.numel(), 1)
    return (values.square() * where).sum() / where.sum().clamp(min=1)
