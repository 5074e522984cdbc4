"""The frozen autoencoder and image tower: prepared scenes in, latents and reference features out.

Live batches, pools of toybox scenes and the cache of shards all go through here. Latents come as mean and spread of the
autoencoder's posterior: published training draws from it at every step, and so does ours (`diffusion_batch.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from model.image_encoder import SubjectImageEncoder
from train.data.prepared_scenes import PreparedScene

PIXELS_A_CALL = 8 * 512 * 512  # that a frozen model sees at once: bounds its working memory
PICTURES_A_CALL = 64


@dataclass(frozen=True)
class EncodedScene:
    """A scene as the frozen models see it."""

    latents: Tensor  # (C, h, w) half, mean of the posterior, scaled
    caption: str
    nouns: tuple[str, ...]
    spans: tuple[tuple[int, int] | None, ...]  # characters of the caption; None: not named there
    boxes: Tensor  # (S, 4) xyxy fractions
    masks: Tensor  # (S, M, M) half, 0..1: share of each cell that is the entity
    pooled: Tensor  # (R, P) half, of all references of all entities, in order
    patches: Tensor  # (R, T, W) half
    reference_counts: tuple[int, ...]  # references of each entity, sums to R
    key: str = ""
    latent_std: Tensor | None = None  # (C, h, w) half, of the posterior, scaled; None: not kept


class FrozenEncoders:
    """Autoencoder and image tower, without gradients, in the precision of the run."""

    def __init__(
        self,
        vae: AutoencoderKL,
        image_encoder: SubjectImageEncoder,
        device: torch.device,
        *,
        precision: torch.dtype = torch.float32,
        tower_stays: bool = True,
    ) -> None:
        """
        Args:
            precision: of the arithmetic (autocast); the weights stay as they are.
            tower_stays: keep the image tower on the device. False where its features are cached: it goes there for
                validation and back, a ViT-H's 2.5 GB are better spent.
        """
        self.vae = vae.to(device).eval().requires_grad_(False)
        home = device if tower_stays else torch.device("cpu")
        self.image_encoder = image_encoder.to(home).eval().requires_grad_(False)
        self.device, self.precision, self.tower_home = device, precision, home

    @property
    def image_size(self) -> int:
        """Side of the frames that the image tower takes."""
        return self.image_encoder.image_size

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) uint8 -> mean and standard deviation of the scaled latents, each (B, C, h, w) float32."""
        means, spreads = [], []
        for part in _parts(pictures):
            with self._autocast():
                posterior = self.vae.encode(self._pixels(part) * 2 - 1).latent_dist
            means.append(posterior.mean.float())
            spreads.append(posterior.std.float())
        factor = self.vae.config.scaling_factor
        return torch.cat(means) * factor, torch.cat(spreads) * factor

    @torch.no_grad()
    def features(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, h, h) uint8 -> pooled vectors (N, P) and patch tokens (N, T, W), float32; N may be 0."""
        tower = self.image_encoder
        if not len(frames):
            pooled, patches = torch.zeros(0, tower.pooled_dim), torch.zeros(0, tower.num_patches, tower.patch_dim)
            return pooled.to(self.device), patches.to(self.device)
        tower.to(self.device)
        found = []
        for part in _parts(frames):
            with self._autocast():
                found.append(tower(self._pixels(part)))
        tower.to(self.tower_home)
        return torch.cat([pooled.float() for pooled, _ in found]), torch.cat([tokens.float() for _, tokens in found])

    def encode(self, scenes: Sequence[PreparedScene], *, keep_std: bool) -> list[EncodedScene]:
        """Scenes as they are kept in a pool or a cache, in main memory and half precision."""
        means, spreads = (x.half().cpu() for x in self.latents(torch.stack([scene.picture for scene in scenes])))
        pooled, patches = (x.half().cpu() for x in self.features(torch.cat([scene.references for scene in scenes])))
        ends = torch.tensor([len(scene.references) for scene in scenes]).cumsum(0).tolist()
        encoded = []
        for row, (scene, end) in enumerate(zip(scenes, ends, strict=True)):
            mine = slice(end - len(scene.references), end)
            encoded.append(
                EncodedScene(
                    latents=means[row],
                    caption=scene.caption,
                    nouns=scene.nouns,
                    spans=scene.spans,
                    boxes=scene.boxes,
                    masks=scene.masks,
                    pooled=pooled[mine],
                    patches=patches[mine],
                    reference_counts=scene.reference_counts,
                    key=scene.key,
                    latent_std=spreads[row] if keep_std else None,
                )
            )
        return encoded

    def _pixels(self, pictures: Tensor) -> Tensor:
        return pictures.to(self.device, non_blocking=True).float() / 255

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32)


def fingerprint(module: nn.Module) -> str:
    """A hash of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _parts(pictures: Tensor) -> tuple[Tensor, ...]:
    return pictures.split(max(1, min(PICTURES_A_CALL, PIXELS_A_CALL // pictures.shape[-1] ** 2)))
