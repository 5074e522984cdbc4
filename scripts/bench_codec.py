"""The gate of the autoencoder: how much nearer it comes to held-out scenes than the linear code of equal size.

    python scripts/bench_codec.py
    python scripts/bench_codec.py --vae ~/.cache/subject-diffusion/runs/toybox/vae/export --picture codec.png

PCA of the autoencoder's patches (8 x 8 pixels), fitted on training scenes, keeps as many numbers a patch as there are
latent channels; PCA of 24 numbers is printed for information. L1 is the mean absolute difference of pixels in 0..1.
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

from data_pipeline.arguments import png_file, positive
from data_pipeline.errors import CommandParser, UserError, run_command
from data_pipeline.toybox.world import ToyboxScene, ToyboxWorld
from infer.loading import SHIPPED, hush_libraries, one_line_errors
from train.data.scenes import as_tensor
from train.pictures import save_grid
from train.tasks.vae import PatchCode

BAR = 0.15  # share by which the autoencoder's L1 must be below PCA's
FITTED_ON = 2000  # training scenes
FOR_INFORMATION = 24  # numbers of the other PCA
BATCH = 50
ROWS, COLUMNS = 6, 4  # of the picture, three pictures a cell


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


def measure(
    vae: AutoencoderKL, num_scenes: int, num_fitted: int
) -> tuple[dict[str, tuple[float, float, float]], list[Tensor]]:
    """Distances on held-out scenes by name of the code, and held-out pictures in -1..1.

    Returns:
        the autoencoder's, then those of PCA of equal size, then of PCA of 24 numbers; and the real pictures, the
        autoencoder's, those of PCA of equal size, each (N, 3, H, W).
    """
    size = vae.config.sample_size
    patch, numbers = 2 ** (len(vae.config.block_out_channels) - 1), vae.config.latent_channels
    known, unseen = ToyboxWorld("train", seed=5, size=size), ToyboxWorld("heldout", seed=1, size=size)
    fitted_on = torch.stack([as_tensor(known.scene(i).image) for i in range(num_fitted)]) * 2 - 1
    scenes = [unseen.scene(i) for i in range(num_scenes)]
    pictures = torch.stack([as_tensor(scene.image) for scene in scenes]) * 2 - 1  # (N, 3, H, W)
    masks = torch.stack([subject_mask(scene) for scene in scenes])  # (N, H, W)
    drawn = {f"autoencoder, {numbers} numbers": through(vae, pictures)}
    for count in dict.fromkeys((numbers, FOR_INFORMATION)):
        code = PatchCode(fitted_on, patch, count)
        drawn[f"PCA, {count} numbers"] = code.decode(code.encode(pictures))
    found = {name: distances(pictures, given, masks) for name, given in drawn.items()}
    return found, [pictures, *list(drawn.values())[:2]]


def verdict(ours: float, linear: float) -> str:
    """The bar and whether it is met."""
    gain = 1 - ours / linear
    met = "met" if gain >= BAR else "not met"
    return f"bar: L1 at least {BAR:.0%} below PCA of equal size: {gain:.1%} ({met})"


def load_vae(folder: Path) -> AutoencoderKL:
    """The autoencoder of a folder.

    Raises:
        UserError: no autoencoder is there.
    """
    if not (folder / "config.json").is_file():  # diffusers would look for a hub id of that name
        raise UserError(f"--vae {folder}: no autoencoder there; expected a folder with config.json and weights")
    with one_line_errors(f"--vae {folder}"):
        kind = AutoencoderKL.load_config(folder).get("_class_name")
        if kind != AutoencoderKL.__name__:
            raise UserError(f"--vae {folder}: holds {kind}; expected {AutoencoderKL.__name__}")
        return AutoencoderKL.from_pretrained(folder, use_safetensors=True).eval()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Checked arguments: what cannot work is refused before anything is measured."""
    parser = CommandParser("bench_codec", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.prog = "scripts/bench_codec.py"
    parser.add_argument("--vae", type=Path, default=SHIPPED / "toybox" / "base" / "vae", help="folder")
    parser.add_argument("--scenes", type=positive, default=400, help="held-out scenes")
    parser.add_argument("--picture", type=png_file, help="PNG: original, autoencoder, PCA of equal size")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    hush_libraries()
    found, shown = measure(load_vae(options.vae), options.scenes, FITTED_ON)
    print(f"L1 on {options.scenes} held-out scenes, PCA fitted on {FITTED_ON} training scenes")
    print(f"{'':24s}    all  subjects  background")
    for name, (everywhere, inside, outside) in found.items():
        print(f"{name:24s} {everywhere:6.4f}  {inside:8.4f}  {outside:10.4f}")
    ours, linear = list(found.values())[:2]
    everywhere, inside, outside = (1 - mine / theirs for mine, theirs in zip(ours, linear, strict=True))
    print(f"{'below PCA of equal size':24s} {everywhere:6.1%}  {inside:8.1%}  {outside:10.1%}")
    print(verdict(ours[0], linear[0]))
    if options.picture:
        cells = [[(given[i] + 1) / 2 for given in shown] for i in range(min(options.scenes, ROWS * COLUMNS))]
        save_grid([sum(cells[i : i + COLUMNS], []) for i in range(0, len(cells), COLUMNS)], options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
