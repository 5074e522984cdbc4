"""The gate of the image encoder: can the picture of a reference be read back from its patch tokens?

    python scripts/bench_encoder.py --picture encoder.png
    python scripts/bench_encoder.py --clip ~/.cache/subject-diffusion/runs/toybox/clip/export

A ridge probe maps every patch token to the pixels of its patch; it is fitted on references of training subjects, its
ridge is chosen on validation subjects, its L1 is that on held-out ones (pixels in 0..1). Beside it stand the probe from
raw patches, cut down by PCA to the count of numbers that a latent cell of `--vae` has; that from tokens of the same
encoder before any training, for random layers lose few pixels; and the mean patch, which knows nothing. With `--clip`,
an open_clip folder with its text tower, retrieval between pictures and captions as CLIP is trained on is printed too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

from data_pipeline.arguments import png_file, positive
from data_pipeline.errors import CommandParser, UserError, run_command
from data_pipeline.toybox.world import ToyboxWorld
from infer.loading import SHIPPED, hush_libraries, one_line_errors
from model.image_encoder import SubjectImageEncoder
from model.open_clip_conversion import load_open_clip
from model.reference import prepare_reference
from train.pictures import save_grid
from train.tasks.clip import ClipPairs

BAR = 0.08  # L1 at which we can name the thing in the probe's picture; look at --picture
JUDGED = 200  # references of validation subjects, and of held-out ones
RIDGES = (1e-4, 1e-2, 1.0, 100.0)  # times the mean variance of the inputs
PAIRS = 128  # pictures and captions of retrieval
BATCH = 100
ROWS, COLUMNS = 8, 3  # of the picture, three pictures a cell


class RidgeProbe:
    """Linear regression with bias, its ridge chosen on other rows."""

    def __init__(self, inputs: Tensor, targets: Tensor, other_inputs: Tensor, other_targets: Tensor) -> None:
        """Fit rows (N, D) -> (N, K); the ridge is the one with the smallest L1 on the other rows."""
        self.centre, self.offset = inputs.mean(dim=0), targets.mean(dim=0)
        x, y = (inputs - self.centre).double(), (targets - self.offset).double()
        gram, product = x.T @ x, x.T @ y
        # An encoder that gives the same token for everything has no variance; the answer is then the mean.
        size = gram.diagonal().mean().clamp(min=1e-9) * torch.eye(len(gram), dtype=gram.dtype)
        candidates = [torch.linalg.solve(gram + ridge * size, product).float() for ridge in RIDGES]
        losses = [float((self._apply(weights, other_inputs) - other_targets).abs().mean()) for weights in candidates]
        self.weights = candidates[losses.index(min(losses))]

    def __call__(self, inputs: Tensor) -> Tensor:
        return self._apply(self.weights, inputs)

    def _apply(self, weights: Tensor, inputs: Tensor) -> Tensor:
        return (inputs - self.centre) @ weights + self.offset


def principal_components(rows: Tensor, count: int) -> Tensor:
    """The first `count` principal directions of rows (N, D): (D, count)."""
    _, vectors = torch.linalg.eigh(torch.cov(rows.T))
    return vectors[:, -count:].flip(1)


def references(split: str, count: int, size: int) -> Tensor:
    """Prepared references on mid-grey of `count` scenes' first subjects: (count, 3, size, size) in 0..1."""
    world = ToyboxWorld(
        split, seed=3, size=size, reference_size=size, min_subjects=1, max_subjects=1, references=(1, 1)
    )
    return torch.stack([prepare_reference(world.scene(i).entities[0].references[0], size) for i in range(count)])


def rows_of_patches(pictures: Tensor, patch: int) -> Tensor:
    """(N, 3, H, W) -> (N·T, 3·patch·patch), patches row by row."""
    return functional.pixel_unshuffle(pictures, patch).flatten(2).transpose(1, 2).flatten(0, 1)


def from_rows(rows: Tensor, patch: int, size: int) -> Tensor:
    """The inverse of `rows_of_patches` for pictures of `size` pixels."""
    side = size // patch
    folded = rows.unflatten(0, (-1, side * side)).transpose(1, 2).unflatten(2, (side, side))
    return functional.pixel_shuffle(folded, patch)


def untrained(encoder: SubjectImageEncoder) -> SubjectImageEncoder:
    """An encoder of the same architecture with random weights, the same ones every time."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        config = encoder.config
        return SubjectImageEncoder(
            config.embed_dim, config.vision_cfg, config.quick_gelu, config.mean, config.std
        ).eval()


@torch.no_grad()
def patch_tokens(encoder: SubjectImageEncoder, pictures: Tensor) -> Tensor:
    """(N, 3, H, W) in 0..1 -> (N·T, W)."""
    return torch.cat([encoder(part)[1] for part in pictures.split(BATCH)]).flatten(0, 1)


def probe(encoder: SubjectImageEncoder, num_fitted: int, numbers: int) -> tuple[dict[str, float], list[Tensor]]:
    """L1 on held-out references by probe, and held-out pictures: real, from tokens, from raw patches.

    Args:
        num_fitted: references of training subjects that the probes are fitted on.
        numbers: components that are left of a raw patch.
    """
    size = encoder.image_size
    patch = size // int(encoder.num_patches**0.5)
    counts = {"train": num_fitted, "val": JUDGED, "heldout": JUDGED}
    shown = [references(split, count, size) for split, count in counts.items()]  # each (N, 3, H, W)
    pixels = [rows_of_patches(pictures, patch) for pictures in shown]
    basis = principal_components(pixels[0], numbers)
    fresh = untrained(encoder)
    inputs = {
        "patch tokens": [patch_tokens(encoder, pictures) for pictures in shown],
        f"raw patches, {numbers} numbers": [rows @ basis for rows in pixels],
        "patch tokens, untrained": [patch_tokens(fresh, pictures) for pictures in shown],
    }
    drawn = {
        name: RidgeProbe(fitted, pixels[0], val, pixels[1])(heldout) for name, (fitted, val, heldout) in inputs.items()
    }
    drawn["mean patch"] = pixels[0].mean(dim=0).expand_as(pixels[2])
    losses = {name: float((rows.clamp(0, 1) - pixels[2]).abs().mean()) for name, rows in drawn.items()}
    return losses, [shown[2], *(from_rows(rows, patch, size) for rows in list(drawn.values())[:2])]


@torch.no_grad()
def retrieval(folder: Path) -> tuple[float, float, int]:
    """Retrieval@1 among held-out pictures and captions: image to text, text to image; and different captions.

    Of equal captions only that of the picture itself counts, as in training: their number bounds what can be found.
    """
    clip, config = load_open_clip(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    pixels, size = config["preprocess_cfg"], config["model_cfg"]["vision_cfg"]["image_size"]
    mean, deviation = (torch.tensor(pixels[name]).view(3, 1, 1) for name in ("mean", "std"))
    world, pairs = ToyboxWorld("heldout", seed=3, size=size, reference_size=size), ClipPairs(tokenizer, size)
    pictures, ids = (torch.stack(part) for part in zip(*(pairs(world.scene(i)) for i in range(PAIRS)), strict=True))
    codes = clip.eval().encode_image((pictures - mean) / deviation, normalize=True)
    similarity = codes @ clip.encode_text(ids, normalize=True).T  # (N, N)
    truth = torch.arange(PAIRS)
    to_text, to_image = (float((similarity.argmax(dim=d) == truth).float().mean()) for d in (1, 0))
    return to_text, to_image, len(ids.unique(dim=0))


def saved_config(option: str, folder: Path, kind: type[ModelMixin]) -> dict[str, Any]:
    """The configuration of a `kind` that was saved to the folder an option names.

    Raises:
        UserError: nothing, or something else, was saved there.
    """
    if not (folder / "config.json").is_file():  # diffusers would look for a hub id of that name
        raise UserError(f"{option} {folder}: no {kind.__name__} there; expected a folder with config.json and weights")
    with one_line_errors(f"{option} {folder}"):
        config = dict(kind.load_config(folder))
    if config.get("_class_name") != kind.__name__:
        raise UserError(f"{option} {folder}: holds {config.get('_class_name')}; expected {kind.__name__}")
    return config


def load_encoder(options: argparse.Namespace) -> SubjectImageEncoder:
    """The image encoder of `--clip` or, without it, of `--encoder`.

    Raises:
        UserError: no image encoder is there.
    """
    if options.clip is None:
        saved_config("--encoder", options.encoder, SubjectImageEncoder)
        with one_line_errors(f"--encoder {options.encoder}"):
            return SubjectImageEncoder.from_pretrained(options.encoder).float().eval()
    with one_line_errors(f"--clip {options.clip}"):
        clip, config = load_open_clip(options.clip)
        pixels = config["preprocess_cfg"]
        return SubjectImageEncoder.from_open_clip(clip, config["model_cfg"], pixels["mean"], pixels["std"]).eval()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Checked arguments: what cannot work is refused before anything is measured."""
    parser = CommandParser("bench_encoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.prog = "scripts/bench_encoder.py"
    toybox = SHIPPED / "toybox"
    parser.add_argument("--encoder", type=Path, default=toybox / "subject" / "image_encoder", help="folder")
    parser.add_argument("--clip", type=Path, help="open_clip folder with both towers, in place of --encoder")
    parser.add_argument(
        "--vae", type=Path, default=toybox / "base" / "vae", help="folder; its code sizes the raw probe"
    )
    parser.add_argument("--references", type=positive, default=2000, help="the probes are fitted on")
    parser.add_argument("--picture", type=png_file, help="PNG: cut-out, from tokens, from raw patches")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    hush_libraries()
    numbers = saved_config("--vae", options.vae, AutoencoderKL)["latent_channels"]
    losses, drawn = probe(load_encoder(options), options.references, numbers)
    print(f"L1 of a ridge probe on {JUDGED} held-out references, fitted on {options.references} of training subjects")
    for name, loss in losses.items():
        print(f"from {name:28s} {loss:.4f}")
    tokens = losses["patch tokens"]
    met = "met" if tokens <= BAR else "not met"
    print(f"bar (our own reading of what is recognisable): L1 from patch tokens <= {BAR}: {tokens:.3f} ({met})")
    if options.clip is None:
        print("retrieval: skipped, the saved image encoder has no text tower; give --clip, an open_clip folder")
    else:
        with one_line_errors(f"--clip {options.clip}"):
            to_text, to_image, captions = retrieval(options.clip)
        print(
            f"retrieval@1 of {PAIRS} held-out pictures, {captions} different captions: "
            f"image to text {to_text:.2f}, text to image {to_image:.2f}, chance {1 / PAIRS:.3f}"
        )
    if options.picture:
        cells = [[given[i].clamp(0, 1) for given in drawn] for i in range(min(JUDGED, ROWS * COLUMNS))]
        save_grid([sum(cells[i : i + COLUMNS], []) for i in range(0, len(cells), COLUMNS)], options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
