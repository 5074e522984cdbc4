"""The gate of the image encoder: can the picture of a reference be read back from its patch tokens?

    python scripts/bench_encoder.py --picture encoder.png
    python scripts/bench_encoder.py --clip ~/.cache/subject-diffusion/runs/toybox/clip/export

A ridge probe maps every patch token to the pixels of its patch; it is fitted on references of training subjects, its
ridge is chosen on validation subjects, its L1 is that on held-out ones (pixels in 0..1). Beside it stand the probe from
raw patches, cut down by PCA to the count of numbers that a latent cell has, and the mean patch, which knows nothing.
With `--clip`, an open_clip folder with its text tower, retrieval between pictures and captions is printed too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTokenizer

from data_pipeline.errors import UserError, run_command
from data_pipeline.toybox.world import ToyboxWorld
from infer.loading import SHIPPED
from model.image_encoder import SubjectImageEncoder
from model.open_clip_conversion import load_open_clip
from model.reference import prepare_reference
from train.pictures import save_grid
from train.scenes import as_tensor

BAR = 0.08  # L1 at which we can name the thing in the probe's picture; look at --picture
NUMBERS = 16  # of the raw probe: latent channels of the toybox autoencoder
RIDGES = (1e-4, 1e-2, 1.0, 100.0)  # times the mean variance of the inputs
PAIRS = 128  # pictures and captions of retrieval


class RidgeProbe:
    """Linear regression with bias, its ridge chosen on other rows."""

    def __init__(self, inputs: Tensor, targets: Tensor, other_inputs: Tensor, other_targets: Tensor) -> None:
        """Fit rows (N, D) -> (N, K); the ridge is the one with the smallest L1 on the other rows."""
        self.centre, self.offset = inputs.mean(dim=0), targets.mean(dim=0)
        x, y = (inputs - self.centre).double(), (targets - self.offset).double()
        gram, product = x.T @ x, x.T @ y
        size = gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
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
    world = ToyboxWorld(split, seed=3, min_subjects=1, max_subjects=1, references=(1, 1))
    return torch.stack([prepare_reference(world.scene(i).entities[0].references[0], size) for i in range(count)])


def rows_of_patches(pictures: Tensor, patch: int) -> Tensor:
    """(N, 3, H, W) -> (N·T, 3·patch·patch), patches row by row."""
    return functional.pixel_unshuffle(pictures, patch).flatten(2).transpose(1, 2).flatten(0, 1)


def from_rows(rows: Tensor, patch: int, size: int) -> Tensor:
    """The inverse of `rows_of_patches` for pictures of `size` pixels."""
    side = size // patch
    folded = rows.unflatten(0, (-1, side * side)).transpose(1, 2).unflatten(2, (side, side))
    return functional.pixel_shuffle(folded, patch)


@torch.no_grad()
def probe(encoder: SubjectImageEncoder, counts: tuple[int, int, int]) -> tuple[dict[str, float], list[Tensor]]:
    """L1 on held-out references by probe, and held-out pictures: real, from tokens, from raw patches."""
    size = encoder.image_size
    patch = size // int(encoder.num_patches**0.5)
    shown = [references(split, count, size) for split, count in zip(("train", "val", "heldout"), counts, strict=True)]
    pixels = [rows_of_patches(pictures, patch) for pictures in shown]
    tokens = [torch.cat([encoder(part)[1] for part in pictures.split(100)]).flatten(0, 1) for pictures in shown]
    basis = principal_components(pixels[0], NUMBERS)
    raw = [rows @ basis for rows in pixels]
    from_tokens = RidgeProbe(tokens[0], pixels[0], tokens[1], pixels[1])(tokens[2])
    from_raw = RidgeProbe(raw[0], pixels[0], raw[1], pixels[1])(raw[2])
    mean = pixels[0].mean(dim=0).expand_as(pixels[2])
    drawn = {"patch tokens": from_tokens, f"raw patches, {NUMBERS} numbers": from_raw, "mean patch": mean}
    losses = {name: float((rows.clamp(0, 1) - pixels[2]).abs().mean()) for name, rows in drawn.items()}
    return losses, [shown[2], from_rows(from_tokens, patch, size), from_rows(from_raw, patch, size)]


@torch.no_grad()
def retrieval(folder: Path) -> tuple[float, float]:
    """Image-to-text and text-to-image retrieval@1 among held-out scenes and their captions."""
    clip, config = load_open_clip(folder)
    pixels = config["preprocess_cfg"]
    mean, deviation = (torch.tensor(pixels[name]).view(3, 1, 1) for name in ("mean", "std"))
    world = ToyboxWorld("heldout", seed=3, size=config["model_cfg"]["vision_cfg"]["image_size"])
    scenes = [world.scene(i) for i in range(PAIRS)]
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    captions = [scene.caption for scene in scenes]
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    pictures = torch.stack([as_tensor(scene.image) for scene in scenes])
    codes = clip.encode_image((pictures - mean) / deviation, normalize=True)
    similarity = codes @ clip.encode_text(ids, normalize=True).T  # (N, N)
    truth = torch.arange(len(scenes))
    return tuple(float((similarity.argmax(dim=d) == truth).float().mean()) for d in (1, 0))  # type: ignore[return-value]


def load_encoder(options: argparse.Namespace) -> SubjectImageEncoder:
    """The encoder of `--clip` or `--encoder`, or one line that says what is wrong."""
    try:
        if options.clip is None:
            return SubjectImageEncoder.from_pretrained(options.encoder).float().eval()
        clip, config = load_open_clip(options.clip)
        pixels = config["preprocess_cfg"]
        return SubjectImageEncoder.from_open_clip(clip, config["model_cfg"], pixels["mean"], pixels["std"]).eval()
    except (OSError, ValueError) as error:
        where = f"--clip {options.clip}" if options.clip else f"--encoder {options.encoder}"
        raise UserError(f"{where}: no image encoder there ({' '.join(str(error).split())[:160]})") from error


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, default=SHIPPED / "toybox" / "subject" / "image_encoder", help="folder")
    parser.add_argument("--clip", type=Path, help="open_clip folder with both towers, in place of --encoder")
    parser.add_argument("--references", type=int, default=2000, help="the probes are fitted on")
    parser.add_argument("--picture", type=Path, help="PNG: cut-out, from tokens, from raw patches")
    options = parser.parse_args(arguments)
    losses, drawn = probe(load_encoder(options), (options.references, 200, 200))
    print(f"L1 of a ridge probe on 200 held-out references, fitted on {options.references} of training subjects")
    for name, loss in losses.items():
        print(f"from {name:28s} {loss:.4f}")
    tokens = losses["patch tokens"]
    print(f"bar: L1 from patch tokens <= {BAR}: {tokens:.3f} ({'met' if tokens <= BAR else 'not met'})")
    if options.clip is None:
        print("retrieval: not measured, the shipped encoder has no text tower; give --clip")
    else:
        to_text, to_image = retrieval(options.clip)
        print(
            f"retrieval@1 of {PAIRS}: image to text {to_text:.2f}, text to image {to_image:.2f}, chance {1 / PAIRS:.3f}"
        )
    if options.picture:
        rows = [[given[i].clamp(0, 1) for i in range(4 * y, 4 * y + 4) for given in drawn] for y in range(6)]
        save_grid(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
