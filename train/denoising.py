"""The denoising loss of the diffusion tasks: noise by sample number, error, its weights, and what is told by timestep.

Pure functions of tensors. Target and min-SNR weights: `model/losses.py`; random numbers: `draws.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from model.losses import diffusion_target, snr_weights
from train.data.diffusion_batch import DiffusionBatch, draw_latents
from train.draws import SampleDraws


class NoisyLatents(NamedTuple):
    """What the UNet is shown, and what it is made of; B samples."""

    latents: Tensor  # (B, C, h, w)
    noise: Tensor  # (B, C, h, w)
    timesteps: Tensor  # (B,) int64
    noisy: Tensor  # (B, C, h, w)


def noised(schedule: Any, batch: DiffusionBatch, draws: SampleDraws) -> NoisyLatents:
    """Latents, noise and timesteps as each sample draws them."""
    timesteps = draws.integers(schedule.config.num_train_timesteps).to(batch.latents.device)
    noise = draws.normal(*batch.latents.shape[1:]).to(batch.latents)
    # Latents last: some batches keep no spread of them, and what a sample draws must not depend on its neighbours.
    latents = draw_latents(batch, draws)
    return NoisyLatents(latents, noise, timesteps, schedule.add_noise(latents, noise, timesteps))


def noised_at(schedule: Any, latents: Tensor, timesteps: Tensor, first: int) -> NoisyLatents:
    """For measuring: samples number `first` and on get the noise of their numbers, whatever the size of the batches."""
    numbers = range(first, first + len(latents))
    noise = SampleDraws(0, 0, numbers).normal(*latents.shape[1:]).to(latents)
    timesteps = timesteps.to(latents.device)
    return NoisyLatents(latents, noise, timesteps, schedule.add_noise(latents, noise, timesteps))


def even_timesteps(schedule: Any, first: int, count: int, of: int) -> Tensor:
    """(count,) timesteps of samples `first` and on when `of` samples share the whole range evenly."""
    numbers = torch.arange(first, first + count)
    return ((numbers + 0.5) * schedule.config.num_train_timesteps / of).long()


def sample_errors(
    schedule: Any,
    prediction: Tensor,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    cell_weights: Tensor | None = None,
) -> Tensor:
    """Mean squared error of each sample, (B,) float32; shapes as in `denoising_loss`."""
    error = (prediction.float() - diffusion_target(schedule, latents, noise, timesteps)).square()  # (B, C, h, w)
    return (error if cell_weights is None else error * cell_weights).flatten(1).mean(dim=1)


def denoising_loss(
    schedule: Any,
    prediction: Tensor,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    gamma: float | None,
    cell_weights: Tensor | None = None,
) -> Tensor:
    """Mean squared error, weighted by min-SNR-gamma and by place: float32 scalar.

    Args:
        schedule: a diffusers noise scheduler.
        prediction, latents, noise: (B, C, h, w).
        timesteps: (B,).
        gamma: of min-SNR; None weighs every timestep the same.
        cell_weights: (B, 1, h, w) weight of each latent cell; None: 1.
    """
    errors = sample_errors(schedule, prediction, latents, noise, timesteps, cell_weights)
    return (errors * snr_weights(schedule, timesteps, gamma)).mean()


def mask_weights(batch: DiffusionBatch, inside: float) -> Tensor:
    """(B, 1, h, w): `inside` where a latent cell is wholly covered by entities, 1 where none is."""
    size = (batch.latents.shape[2], batch.latents.shape[3])
    covered = functional.adaptive_avg_pool2d(batch.masks.sum(dim=1, keepdim=True).clamp(max=1), size)  # (B, 1, h, w)
    return 1 + (inside - 1) * covered


@torch.no_grad()
def by_band(name: str, errors: Tensor, timesteps: Tensor, num_timesteps: int, bands: int) -> dict[str, Tensor]:
    """Mean of `errors` (B,) in each of so many equal ranges of timesteps: NAME_t0, the least noise, to NAME_t{bands-1}.

    NaN where no sample falls into a band.
    """
    band = timesteps * bands // num_timesteps  # (B,)
    found = {}
    for number in range(bands):
        inside = band == number
        found[f"{name}_t{number}"] = torch.where(inside, errors, 0).sum() / inside.sum()
    return found
