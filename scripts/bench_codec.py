"""The gate of the autoencoder: how much nearer it comes to held-out scenes than the linear code of equal size.

    python scripts/bench_codec.py
    python scripts/bench_codec.py --vae ~/.cache/subject-diffusion/runs/toybox/vae/export --picture codec.png

PCA of 8 x 8 patches, fitted on training scenes, keeps as many numbers a patch as the autoencoder has latent channels;
PCA of 24 numbers is printed for information. L1 is the mean absolute difference of pixels in 0..1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from data_pipeline.errors import UserError, run_command
from data_pipeline.toybox.world import ToyboxScene, ToyboxWorld
from infer.loading import SHIPPED
from train.pictures import save_grid
from train.scenes import as_tensor
from train.tasks.vae import PatchCode

BAR = 0.15  # share by which the autoencoder's L1 must be below PCA's
FITTED_ON = 2000  # training scenes
BATCH = 50


@torch.no_grad()
def through(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """(N, 3, H, W) in -1..1 -> what the autoencoder gives back of them, without noise."""
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in pictures.split(BATCH)])


def distances(pictures: Tensor, drawn: Tensor, masks: Tensor) -> tuple[float, float, float]:
    """L1 over all pixels, inside and outside of masks (N, H, W); pictures in -1..1, distances of 0..1."""
    error = (drawn.clamp(-1, 1) - pictures).abs().mean(dim=1) / 2  # (N, H, W)
    return float(error.mean()), float(error[masks].mean()), float(error[~masks].mean())


def subject_mask(scene: ToyboxScene) -> Tensor:
    """(H, W) bool: where any subject is seen."""
    size = scene.image.shape[0]
    seen = [entity.mask for entity in scene.entities] or [np.zeros((size, size), bool)]
    return torch.from_numpy(np.any(seen, axis=0))


def verdict(ours: float, linear: float) -> str:
    """The bar and whether it is met."""
    gain = 1 - ours / linear
    met = "met" if gain >= BAR else "not met"
    return f"bar: L1 at least {BAR:.0%} below PCA of equal size: {gain:.1%} ({met})"


def load_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder of a folder, or one line that says what is wrong with it."""
    try:
        return AutoencoderKL.from_pretrained(folder, use_safetensors=True).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--vae {folder}: no autoencoder there ({' '.join(str(error).split())[:160]})") from error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, default=SHIPPED / "toybox" / "base" / "vae", help="folder")
    parser.add_argument("--scenes", type=int, default=400, help="held-out scenes")
    parser.add_argument("--picture", type=Path, help="PNG: original, autoencoder, PCA")
    options = parser.parse_args(arguments)
    vae = load_vae(options.vae)
    size = vae.config.sample_size
    patch, numbers = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels
    known, unseen = ToyboxWorld("train", seed=5, size=size), ToyboxWorld("heldout", seed=1, size=size)
    fitted_on = torch.stack([as_tensor(known.scene(i).image) for i in range(FITTED_ON)]) * 2 - 1
    scenes = [unseen.scene(i) for i in range(options.scenes)]
    pictures = torch.stack([as_tensor(scene.image) for scene in scenes]) * 2 - 1  # (N, 3, H, W)
    masks = torch.stack([subject_mask(scene) for scene in scenes])  # (N, H, W)
    codes = {count: PatchCode(fitted_on, patch, count) for count in sorted({numbers, 24})}
    drawn = {f"autoencoder, {numbers} numbers": through(vae, pictures)}
    drawn |= {f"PCA, {count} numbers": code.decode(code.encode(pictures)) for count, code in codes.items()}
    print(f"L1 on {len(scenes)} held-out scenes, {patch} x {patch} pixels a code | all | subjects | background")
    found = {name: distances(pictures, given, masks) for name, given in drawn.items()}
    for name, values in found.items():
        print(f"{name:24s} " + "  ".join(f"{value:.4f}" for value in values))
    print(verdict(found[f"autoencoder, {numbers} numbers"][0], found[f"PCA, {numbers} numbers"][0]))
    if options.picture:
        shown = [pictures, *(drawn[name] for name in list(drawn)[:2])]
        rows = [[(given[i] + 1) / 2 for i in range(4 * y, 4 * y + 4) for given in shown] for y in range(6)]
        save_grid(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
