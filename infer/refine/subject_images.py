"""The pictures of a subject that a refinement learns from: read, checked, squared, and varied at every step.

What is odd about a picture but not wrong (cropped, small, blurred, unlike the others) becomes a warning that names its
file. Transparent pixels and the border of a shrunk picture do not count in the loss. Size augmentation: Custom
Diffusion, arXiv 2212.04488, section 3.2, and LASR's `min_rand_scaling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.settings import Settings
from infer.cutout import load_picture
from model.image_encoder import SubjectImageEncoder
from model.reference import MID_GREY, prepare_reference

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SHARP = 12.0  # variance of the Laplacian of a grey picture scaled to 256 px; below, edges are lost
ALIKE = 0.5  # cosine of two pictures' CLIP vectors; below, a person would hardly say that they show the same thing


class VariationSettings(Settings):
    """How a subject's picture is varied before a step sees it; each chance is of one sample."""

    flip: float = Field(0.5, ge=0, le=1)  # chance of a mirrored picture
    shrink: float = Field(0.0, ge=0, le=1)  # chance of a smaller picture on empty ground, which the loss leaves out
    shrink_to: float = Field(0.7, gt=0, le=1)  # smallest side, as a share
    enlarge: float = Field(0.0, ge=0, le=1)  # chance of a part of the picture; after `shrink`, so both sum to 1 at most
    enlarge_to: tuple[float, float] = (1.2, 1.4)
    say_size: bool = False  # tell the prompt: "very small", "far away", "zoomed in", "close up"


@dataclass(frozen=True)
class SubjectPicture:
    """One square picture; transparent where it does not count."""

    path: Path
    rgba: np.ndarray  # (S, S, 4) uint8


@dataclass(frozen=True)
class VariedPicture:
    """What one sample shows."""

    pixels: Tensor  # (3, S, S) float32 in 0..1
    valid: Tensor  # (1, S, S) float32, 1 where the loss counts
    size_words: str  # "", or words that tell how large the subject is: "very small "


def find_pictures(places: Sequence[Path]) -> list[Path]:
    """The picture files of files and folders, folders by name.

    Raises:
        UserError: a place that does not exist; no picture at all.
    """
    found: list[Path] = []
    for place in places:
        place = place.expanduser()
        if not place.exists():
            raise UserError(f"images {place}: no such file or folder; give pictures of the subject")
        if place.is_dir():
            found += sorted(path for path in place.iterdir() if path.suffix.lower() in PICTURES)
        else:
            found.append(place)
    if not found:
        raise UserError(
            f"images {', '.join(map(str, places)) or '(none)'}: no pictures there; give 3 to 5 of the subject "
            f"({', '.join(PICTURES)})"
        )
    return found


def read_pictures(files: Sequence[Path], size: int) -> tuple[list[SubjectPicture], list[str]]:
    """Read, turn upright and square pictures.

    Args:
        size: side of the squares in pixels.
    Returns:
        The pictures, and a warning for each that lost something.
    Raises:
        UserError: a file that is no picture.
    """
    pictures, warnings = [], []
    for file in files:
        picture = load_picture(file).convert("RGBA")
        width, height = picture.size
        side = min(width, height)
        if max(width, height) > 1.05 * side:
            warnings.append(f"{file}: {width} x {height} pixels, cropped to the middle square")
        if side < size / 2:
            warnings.append(f"{file}: only {width} x {height} pixels for {size} x {size}; a larger one shows more")
        left, top = (width - side) // 2, (height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        if _sharpness(square) < SHARP:
            warnings.append(f"{file}: looks blurred; a sharp picture is learnt better")
        rgba = np.array(square.resize((size, size), Image.Resampling.LANCZOS))
        if not (rgba[..., 3] > 127).any():
            raise UserError(f"{file}: every pixel of its middle square is transparent; give a picture that shows it")
        pictures.append(SubjectPicture(file, rgba))
    if len(pictures) == 1:
        warnings.append(f"{files[0]}: the only picture; its background is learnt with the subject, 3 to 5 are better")
    return pictures, warnings


@torch.no_grad()
def unlike_pictures(pictures: Sequence[SubjectPicture], encoder: SubjectImageEncoder) -> list[str]:
    """A warning for each picture that is unlike all others, with the similarity to the nearest."""
    if len(pictures) < 2:
        return []
    frames = torch.stack([prepare_reference(picture.rgba, encoder.image_size) for picture in pictures])
    vectors = torch.nn.functional.normalize(encoder(frames.to(encoder.device, encoder.dtype))[0].float(), dim=-1)
    similarity = (vectors @ vectors.T).fill_diagonal_(-1.0)  # (N, N)
    nearest, which = similarity.max(dim=1)
    return [
        f"{picture.path}: may show something else (similarity {value:.2f} to {pictures[other].path.name}, its nearest)"
        for picture, value, other in zip(pictures, nearest.tolist(), which.tolist(), strict=True)
        if value < ALIKE
    ]


def vary(picture: SubjectPicture, settings: VariationSettings, rng: np.random.Generator) -> VariedPicture:
    """A picture as one sample sees it; the same `rng` state, the same sample."""
    rgba = picture.rgba
    if rng.random() < settings.flip:
        rgba = rgba[:, ::-1]
    chance, words = rng.random(), ""
    if chance < settings.shrink:
        share = rng.uniform(settings.shrink_to, 1.0)
        rgba = _shrunk(rgba, share, rng)
        if share < 0.6:
            words = str(rng.choice(["far away ", "very small "]))
    elif chance < settings.shrink + settings.enlarge:
        rgba = _enlarged(rgba, rng.uniform(*settings.enlarge_to), rng)
        words = str(rng.choice(["zoomed in ", "close up "]))
    valid = torch.from_numpy(np.ascontiguousarray(rgba[..., 3])).float()[None] / 255  # (1, S, S)
    colour = torch.from_numpy(np.ascontiguousarray(rgba[..., :3])).permute(2, 0, 1).float() / 255  # (3, S, S)
    pixels = colour * valid + (MID_GREY / 255) * (1 - valid)
    return VariedPicture(pixels, valid, words if settings.say_size else "")


def _sharpness(picture: Image.Image) -> float:
    """Variance of the Laplacian, the picture scaled to 256 px."""
    grey = cv2.resize(np.array(picture.convert("RGB").convert("L")), (256, 256), interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def _shrunk(rgba: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """The picture at `share` of its side, somewhere on a transparent canvas of its size."""
    size = rgba.shape[0]
    side = max(1, round(size * share))
    top, left = (int(rng.integers(0, size - side + 1)) for _ in range(2))
    canvas = np.zeros_like(rgba)
    canvas[top : top + side, left : left + side] = cv2.resize(rgba, (side, side), interpolation=cv2.INTER_AREA)
    return canvas


def _enlarged(rgba: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """A part of the picture, `1 / factor` of its side, at full size."""
    size = rgba.shape[0]
    side = max(1, round(size / factor))
    top, left = (int(rng.integers(0, size - side + 1)) for _ in range(2))
    part = np.ascontiguousarray(rgba[top : top + side, left : left + side])
    return cv2.resize(part, (size, size), interpolation=cv2.INTER_CUBIC)
