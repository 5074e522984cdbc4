"""The pictures of a subject that a refinement learns from: read, checked, squared, and varied at every step.

What is odd about a picture but not wrong (cropped, small, blurred, unlike the others) becomes a warning that names its
file. Transparent pixels and the border of a shrunk picture do not count in the loss. Beside NAME.png there may stand
NAME.txt, what it shows ("a {} on the beach"), and NAME.mask.png, white where the subject is. Size augmentation: Custom
Diffusion, arXiv 2212.04488, section 3.2, and LASR's `min_rand_scaling`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.settings import Settings
from infer.cutout import cut_out, load_picture
from infer.subjects import Box
from model.image_encoder import SubjectImageEncoder
from model.reference import MID_GREY, prepare_reference

MASK = ".mask.png"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SHARP = 12.0  # variance of the Laplacian of a grey picture scaled to 256 px; below, edges are lost
ALIKE = 0.5  # cosine of two pictures' CLIP vectors; below, a person would hardly say that they show the same thing


class VariationSettings(Settings):
    """How a subject's picture is varied and weighed before a step sees it; each chance is of one sample."""

    flip: float = Field(0.5, ge=0, le=1)  # chance of a mirrored picture
    shrink: float = Field(0.0, ge=0, le=1)  # chance of a smaller picture on empty ground, which the loss leaves out
    shrink_to: float = Field(0.7, gt=0, le=1)  # smallest side, as a share
    enlarge: float = Field(0.0, ge=0, le=1)  # chance of a part of the picture; after `shrink`, so both sum to 1 at most
    enlarge_to: tuple[float, float] = (1.2, 1.4)
    say_size: bool = False  # tell the prompt: "very small", "far away", "zoomed in", "close up"
    background_weight: float = Field(1.0, ge=0, le=1)  # of the loss where the subject is not; below 1 it is told apart
    # by NAME.mask.png, else by its transparency, else by GrabCut


@dataclass(frozen=True)
class SubjectPicture:
    """One square picture; transparent where it does not count."""

    path: Path
    rgba: np.ndarray  # (S, S, 4) uint8
    subject: np.ndarray | None = None  # (S, S) uint8, 255 where it is; None: not told apart
    caption: str | None = None  # a template of its own, {} once; None: the run's templates


@dataclass(frozen=True)
class VariedPicture:
    """What one sample shows."""

    pixels: Tensor  # (3, S, S) float32 in 0..1
    valid: Tensor  # (1, S, S) float32 in 0..1, how much the loss counts
    size_words: str  # "", or words that tell how large the subject is: "very small "
    resized: bool  # whether the picture comes in a size that it will hardly come in again
    box: Box | None = None  # where its subject is, as fractions; None: out of sight, or not told apart


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
            found += sorted(
                path for path in place.iterdir() if path.suffix.lower() in PICTURES and not path.name.endswith(MASK)
            )
        else:
            found.append(place)
    if not found:
        raise UserError(
            f"images {', '.join(map(str, places)) or '(none)'}: no pictures there; give 3 to 5 of the subject "
            f"({', '.join(PICTURES)})"
        )
    return found


def read_pictures(
    files: Sequence[Path], size: int, *, tell_apart: bool = False
) -> tuple[list[SubjectPicture], list[str]]:
    """Read, turn upright and square pictures.

    Args:
        size: side of the squares in pixels.
        tell_apart: find out where the subject is.
    Returns:
        The pictures, and a warning for each that lost something.
    Raises:
        UserError: a file that is no picture; a subject that does not stand out.
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
        middle = (left, top, left + side, top + side)
        square = picture.crop(middle)
        if _sharpness(square) < SHARP:
            warnings.append(f"{file}: looks blurred; a sharp picture is learnt better")
        rgba = np.array(square.resize((size, size), Image.Resampling.LANCZOS))
        if not (rgba[..., 3] > 127).any():
            raise UserError(f"{file}: every pixel of its middle square is transparent; give a picture that shows it")
        subject = None
        if tell_apart:
            mask = _mask(file, picture).crop(middle).resize((size, size), Image.Resampling.BILINEAR)
            subject = np.array(mask)
        pictures.append(SubjectPicture(file, rgba, subject))
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


def with_captions(pictures: Sequence[SubjectPicture], class_word: str) -> list[SubjectPicture]:
    """The pictures, each with what NAME.txt beside it says, where there is one.

    Args:
        class_word: stands for the subject in texts without {}.
    Raises:
        UserError: a text that cannot be read or does not name the subject once.
    """
    return [replace(picture, caption=_caption(picture.path.with_suffix(".txt"), class_word)) for picture in pictures]


def vary(picture: SubjectPicture, settings: VariationSettings, rng: np.random.Generator) -> VariedPicture:
    """A picture as one sample sees it; the same `rng` state, the same sample."""
    layers = picture.rgba if picture.subject is None else np.dstack([picture.rgba, picture.subject])  # (S, S, 4 or 5)
    if rng.random() < settings.flip:
        layers = layers[:, ::-1]
    chance, words = rng.random(), ""
    resized = chance < settings.shrink + settings.enlarge
    if chance < settings.shrink:
        share = rng.uniform(settings.shrink_to, 1.0)
        layers = _shrunk(layers, share, rng)
        if share < 0.6:
            words = str(rng.choice(["far away ", "very small "]))
    elif resized:
        layers = _enlarged(layers, rng.uniform(*settings.enlarge_to), rng)
        words = str(rng.choice(["zoomed in ", "close up "]))
    parts = torch.from_numpy(np.ascontiguousarray(layers)).permute(2, 0, 1).float() / 255  # (4 or 5, S, S)
    colour, valid, subject = parts[:3], parts[3:4], parts[4:]
    pixels = colour * valid + (MID_GREY / 255) * (1 - valid)
    if len(subject):
        valid = valid * torch.lerp(torch.tensor(settings.background_weight), torch.tensor(1.0), subject)
    box = _box(layers[..., 4]) if len(subject) else None
    return VariedPicture(pixels, valid, words if settings.say_size else "", resized, box)


def _box(subject: np.ndarray) -> Box | None:
    """Where a mask (h, w), 0..255, shows something."""
    height, width = subject.shape
    found = Image.fromarray(np.where(subject > 127, np.uint8(255), np.uint8(0))).getbbox()
    return None if found is None else (found[0] / width, found[1] / height, found[2] / width, found[3] / height)


def _mask(file: Path, picture: Image.Image) -> Image.Image:
    """Where the subject of an upright RGBA picture is: grey, white there."""
    beside = file.with_name(f"{file.stem}{MASK}")
    told = load_picture(beside).convert("L") if beside.is_file() else None
    return cut_out(picture, mask=told, name=str(file)).getchannel("A")


def _caption(file: Path, class_word: str) -> str | None:
    if not file.is_file():
        return None
    try:
        text = " ".join(file.read_text(encoding="utf-8").split())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as text ({error})") from error
    if "{}" not in text:
        text = re.sub(rf"\b{re.escape(class_word)}\b", "{}", text)
    if text.count("{}") != 1:
        raise UserError(
            f"{file}: {text.replace('{}', class_word)!r}: expected the subject once, as {{}} or {class_word!r}; "
            "correct it, or remove the file"
        )
    return text


def _sharpness(picture: Image.Image) -> float:
    """Variance of the Laplacian, the picture scaled to 256 px."""
    grey = cv2.resize(np.array(picture.convert("RGB").convert("L")), (256, 256), interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


def _shrunk(layers: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """The picture at `share` of its side, somewhere on a transparent canvas of its size."""
    size = layers.shape[0]
    side = max(1, round(size * share))
    top, left = (int(rng.integers(0, size - side + 1)) for _ in range(2))
    canvas = np.zeros_like(layers)
    canvas[top : top + side, left : left + side] = _resized(layers, side, cv2.INTER_AREA)
    return canvas


def _enlarged(layers: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    """A part of the picture, `1 / factor` of its side, at full size."""
    size = layers.shape[0]
    side = max(1, round(size / factor))
    top, left = (int(rng.integers(0, size - side + 1)) for _ in range(2))
    return _resized(layers[top : top + side, left : left + side], size, cv2.INTER_CUBIC)


def _resized(layers: np.ndarray, side: int, interpolation: int) -> np.ndarray:
    """(S, S, N) -> (side, side, N); layer by layer, OpenCV takes four at most."""
    layers = layers.transpose(2, 0, 1)
    return np.dstack(
        [cv2.resize(np.ascontiguousarray(one), (side, side), interpolation=interpolation) for one in layers]
    )
