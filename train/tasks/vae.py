"""The autoencoder (stock `AutoencoderKL`), started from the linear code "PCA of 8 x 8 patches".

From random weights it takes long to find a code as good as PCA's, so for the first steps the encoder is regressed on
the PCA code and the decoder learns to draw from it; then both are trained end to end on |x - x'| and on |∇x - ∇x'|.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from train.data.scenes import SceneDataset, as_tensor, make_world
from train.draws import SampleDraws
from train.pictures import save_grid
from train.settings import TrainSettings, load_model_settings
from train.tasks.toybox_task import ToyboxTask


class PatchCode(nn.Module):
    """PCA of non-overlapping patches: the best linear code of its size, scaled as a whole to unit variance."""

    def __init__(self, pictures: Tensor, patch: int, components: int) -> None:
        """Fit on `pictures` (N, 3, H, W) in -1..1."""
        super().__init__()
        self.patch = patch
        rows = self._rows(pictures).reshape(-1, 3 * patch * patch)
        mean = rows.mean(dim=0)
        _, vectors = torch.linalg.eigh(torch.cov((rows - mean).T))
        basis = vectors[:, -components:].flip(1)  # (3·p·p, K), largest variance first
        scale = ((rows - mean) @ basis).std()
        self.mean: Tensor
        self.basis: Tensor
        self.scale: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("basis", basis)
        self.register_buffer("scale", scale)

    def _rows(self, pictures: Tensor) -> Tensor:
        folded = functional.pixel_unshuffle(pictures, self.patch)  # (N, 3·p·p, h, w)
        return folded.permute(0, 2, 3, 1)

    def encode(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, K, H/p, W/p)."""
        return ((self._rows(pictures) - self.mean) @ self.basis / self.scale).permute(0, 3, 1, 2)

    def decode(self, code: Tensor) -> Tensor:
        """(N, K, h, w) -> (N, 3, h·p, w·p)."""
        rows = (code.permute(0, 2, 3, 1) * self.scale) @ self.basis.T + self.mean
        return functional.pixel_shuffle(rows.permute(0, 3, 1, 2), self.patch)


def gradient_distance(first: Tensor, second: Tensor) -> Tensor:
    """Mean |difference of finite differences|: edges count, not only areas."""
    difference = first - second
    return (difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()) / 2


class VaeLoss(nn.Module):
    """Autoencoder and loss."""

    def __init__(self, vae: AutoencoderKL, code: PatchCode, code_steps: int, kl_weight: float) -> None:
        super().__init__()
        self.vae, self.code_steps, self.kl_weight = vae, code_steps, kl_weight
        self.__dict__["code"] = code  # fixed, and no part of what is saved

    def forward(self, pictures: Tensor, draws: SampleDraws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        pictures = pictures * 2 - 1  # (N, 3, H, W) in -1..1
        posterior = self.vae.encode(pictures).latent_dist
        if step < self.code_steps:
            target = self.code.encode(pictures)
            drawn = self.vae.decode(target).sample
            loss = functional.l1_loss(posterior.mean, target)
        else:
            latents = posterior.mean + posterior.std * draws.normal(*posterior.mean.shape[1:]).to(posterior.mean)
            drawn = self.vae.decode(latents).sample
            loss = self.kl_weight * posterior.kl().mean()
        distance = functional.l1_loss(drawn, pictures)
        return loss + distance + gradient_distance(drawn, pictures), {"l1": distance / 2}


class VaeTask(ToyboxTask):
    """`options`: code_steps (steps on the PCA code), kl_weight."""

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        options: dict[str, Any] = {"code_steps": 1000, "kl_weight": 1e-6} | settings.options
        architecture = load_model_settings(settings.model).architecture["vae"]
        world = make_world(settings.data)
        self.dataset = SceneDataset(
            world, lambda scene: torch.from_numpy(scene.image), distinct=settings.data.distinct_scenes
        )
        fitted_on = torch.stack([as_tensor(world.scene(-1 - i).image) for i in range(800)]) * 2 - 1
        patch = 2 ** (len(architecture["block_out_channels"]) - 1)
        code = PatchCode(fitted_on, patch, architecture["latent_channels"]).to(device)
        self.vae = AutoencoderKL(**architecture, force_upcast=False)
        # An untrained posterior has a spread of 1, as much as the code itself; the first end-to-end steps would drown.
        nn.init.constant_(self.vae.quant_conv.bias[architecture["latent_channels"] :], -6.0)
        self.module = VaeLoss(self.vae, code, **options)
        unseen = make_world(settings.data, split="val", seed=settings.data.seed + 1)
        self.unseen = torch.stack([as_tensor(unseen.scene(i).image) for i in range(64)]).to(device)

    def collate(self, items: list[Tensor]) -> Tensor:
        return torch.stack(items).permute(0, 3, 1, 2)

    def batch(self, collated: Tensor) -> Tensor:
        return super().batch(collated).float() / 255

    @torch.no_grad()
    def validate(self, picture: Path) -> dict[str, float]:
        pictures = self.unseen * 2 - 1
        drawn = self.vae.decode(self.vae.encode(pictures).latent_dist.mean).sample
        linear = self.module.code.decode(self.module.code.encode(pictures))
        save_grid(
            [
                [(row[i] + 1) / 2 for row in (pictures, drawn, linear) for i in (4 * y, 4 * y + 1, 4 * y + 2)]
                for y in range(6)
            ],
            picture,
        )
        return {
            "l1": float((drawn - pictures).abs().mean() / 2),
            "pca_l1": float((linear.clamp(-1, 1) - pictures).abs().mean() / 2),
        }

    @torch.no_grad()
    def export(self, folder: Path) -> None:
        # Latents are scaled as a whole, not number by number, so that low frequencies keep their weight.
        spread = self.vae.encode(self.unseen * 2 - 1).latent_dist.mean.std()
        self.vae.register_to_config(scaling_factor=float(1 / spread))
        self.vae.save_pretrained(folder)
