"""What training minimises: the diffusion target, its weight by noise level, and the attention-map loss.

Pure functions of tensors. Attention-map loss: L_attn of Subject-Diffusion, arXiv 2307.11410, and its balanced form from
FastComposer's localisation loss, arXiv 2305.10431. Weight by signal-to-noise ratio: Min-SNR-gamma, arXiv 2303.09556.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MapLoss = Literal["balanced", "absolute"]


def attention_map_loss(
    maps: Mapping[str, Tensor],
    masks: Tensor,
    keep: Tensor,
    kind: MapLoss = "balanced",
) -> Tensor:
    """How far the supervised tokens look past their subjects.

    balanced: mean attention outside the mask minus mean attention inside it, in -1..1.
    absolute: mean |A - M| over all pixels, in 0..1: L_attn = 1/N sum_k sum_l |CA_l(z_t, y_k) - M_k| as published.
    Averaged over a row's kept subjects, over heads, rows (a row without subjects counts as 0), then layers.

    Args:
        maps: layer name -> (B, heads, S, Q) attention probabilities; Q = height x width of the layer, row by row.
        masks: (B, S, H, W) subject masks 0..1 of any size with the picture's aspect ratio; shrunk by area averaging.
        keep: (B, S) bool, False for padding and for rows whose text or subjects were dropped (no placeholder there).
        kind: "balanced" or "absolute".
    Returns:
        float32 scalar.
    """
    if not maps:
        raise ValueError("attention_map_loss: no maps; pass the recorder in the UNet's cross_attention_kwargs")
    return torch.stack([_layer_loss(layer_maps, masks, keep, kind) for layer_maps in maps.values()]).mean()


def _layer_loss(maps: Tensor, masks: Tensor, keep: Tensor, kind: MapLoss) -> Tensor:
    size = _layer_size(maps.shape[-1], masks.shape[-2], masks.shape[-1])
    probabilities = maps.float()  # (B, heads, S, Q)
    inside = F.interpolate(masks.float(), size=size, mode="area").flatten(2)[:, None]  # (B, 1, S, Q)
    if kind == "balanced":
        loss = _weighted_mean(probabilities, 1 - inside) - _weighted_mean(probabilities, inside)  # (B, heads, S)
    elif kind == "absolute":
        loss = (probabilities - inside).abs().mean(dim=-1)  # (B, heads, S)
    else:
        raise ValueError(f"attention_map_loss: kind {kind!r}; expected 'balanced' or 'absolute'")
    kept = keep[:, None].expand_as(loss)  # (B, heads, S)
    # masked_fill and not a product: a padding subject must not pass on even a NaN.
    per_row = loss.masked_fill(~kept, 0).sum(-1) / kept.sum(-1).clamp_min(1)  # (B, heads)
    return per_row.mean()


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean over the last dimension; 0 where all weights are 0 (a mask that fills the picture, or is empty)."""
    return (values * weights).sum(-1) / weights.sum(-1).clamp_min(1e-5)


@functools.cache
def _layer_size(num_pixels: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of a layer with `num_pixels` query tokens: the factors nearest to the masks' aspect ratio."""
    factors = [factor for factor in range(1, num_pixels + 1) if num_pixels % factor == 0]
    layer_height = min(factors, key=lambda h: abs(math.log(h * h / num_pixels) - math.log(height / width)))
    return layer_height, num_pixels // layer_height


def diffusion_target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet shall predict from `scheduler.add_noise(latents, noise, timesteps)`, as the scheduler is set.

    Args:
        scheduler: a diffusers noise scheduler; `config.prediction_type` decides.
        latents, noise: (B, C, h, w).
        timesteps: (B,) int64.
    Returns:
        (B, C, h, w): the noise (epsilon), the velocity (v_prediction) or the latents (sample).
    """
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if prediction_type == "sample":
        return latents
    raise ValueError(f"scheduler prediction_type {prediction_type!r}: expected epsilon, v_prediction or sample")


def snr_weights(scheduler: Any, timesteps: Tensor, gamma: float | None) -> Tensor:
    """Min-SNR weight of each sample's squared error; with SNR = alpha_bar / (1 - alpha_bar).

    epsilon: min(SNR, gamma) / SNR; v_prediction: min(SNR, gamma) / (SNR + 1); sample: min(SNR, gamma).

    Args:
        scheduler: a diffusers noise scheduler with `alphas_cumprod`.
        timesteps: (B,) int64.
        gamma: the cap, 5 in the paper; None weighs all timesteps alike.
    Returns:
        (B,) float32.
    """
    if gamma is None:
        return torch.ones(timesteps.shape, device=timesteps.device)
    alpha_bar = scheduler.alphas_cumprod.to(timesteps.device, torch.float32)[timesteps]  # (B,)
    snr = alpha_bar / (1 - alpha_bar)  # (B,)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return (gamma / snr).clamp_max(1)  # the same quotient, finite at SNR 0 (zero terminal SNR)
    if prediction_type == "v_prediction":
        return snr.clamp_max(gamma) / (snr + 1)
    if prediction_type == "sample":
        return snr.clamp_max(gamma)
    raise ValueError(f"scheduler prediction_type {prediction_type!r}: expected epsilon, v_prediction or sample")
