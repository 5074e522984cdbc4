"""From a photo to the cut-out of its subject: the alpha channel, a given mask, or GrabCut.

Stands between the files a person gives and `model/reference.py`, which centres a cut-out for the image encoder.
GrabCut: Rother, Kolmogorov, Blake, SIGGRAPH 2004, OpenCV's implementation.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from data_pipeline.errors import UserError

CutoutMethod = Literal["auto", "alpha", "grabcut", "none"]
Pixels = NDArray[np.uint8]

MAX_SIDE = 1024  # pixels; the image encoders look at 224 to 336
MAX_PIXELS = 200_000_000  # refuse to decode more than this
GRABCUT_SIDE = 384  # pixels; GrabCut's time grows with the area, its outline is smoothed when scaled back
GRABCUT_ROUNDS = 5
BORDER_SHARE = 0.04  # of each side: taken as background by GrabCut
MIN_SUBJECT_SHARE = 0.001  # of the picture: less is an empty cut-out
MIN_ISLAND_SHARE = 0.05  # of the largest connected part: smaller islands are dropped


def load_picture(path: Path) -> Image.Image:
    """Open a picture upright (EXIF rotation applied) with a longer side of at most 1024 px.

    Of an animated file the first frame is taken; 16-bit, CMYK, grey and palette pictures are converted.

    Returns:
        An RGB or RGBA image.
    Raises:
        UserError: no such file, not a picture, damaged, or larger than 200 million pixels.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file; give the path of a picture")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the path of a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large pictures and odd metadata; both are handled here
            with Image.open(path) as opened:
                width, height = opened.size
                if width * height > MAX_PIXELS:
                    raise UserError(f"{path}: {width} x {height} pixels; shrink it to {MAX_PIXELS:,}")
                opened.draft("RGB", (MAX_SIDE, MAX_SIDE))  # JPEG only: decode small
                opened.load()
                return _bounded(_eight_bit(ImageOps.exif_transpose(opened)))
    except UnidentifiedImageError:
        raise UserError(f"{path}: not a picture that can be read; give a PNG, JPEG or WebP file") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: too many pixels; at most {MAX_PIXELS:,} are read, shrink it first") from None
    except PermissionError:
        raise UserError(f"{path}: no permission to read it") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's words for damaged data
        raise UserError(f"{path}: the picture is damaged ({error}); save it again") from None


def cut_out(
    picture: Image.Image, *, mask: Image.Image | None = None, method: CutoutMethod = "auto", name: str = "picture"
) -> Image.Image:
    """Separate the subject from its background.

    Args:
        picture: RGB or RGBA.
        mask: bright where the subject is, any size; wins over `method`.
        method: `auto` takes the alpha channel if it hides anything, else GrabCut; `none` keeps the whole picture.
        name: what to call the picture in errors.
    Returns:
        RGBA image of the picture's size; alpha 0 is background.
    Raises:
        UserError: the cut-out would be empty, or `alpha` is asked of a picture that has none.
    """
    pixels = np.array(picture.convert("RGBA"))  # (H, W, 4)
    if mask is not None:
        grey = mask.getchannel("A") if mask.mode == "RGBA" and _hides_something(np.array(mask)) else mask.convert("L")
        pixels[..., 3] = np.array(grey.resize(picture.size, Image.Resampling.BILINEAR))
        return _checked(pixels, f"{name}: the mask marks nothing; paint the subject white")
    if method == "none":
        pixels[..., 3] = 255
        return Image.fromarray(pixels)
    if method == "alpha" or (method == "auto" and _hides_something(pixels)):
        if not _hides_something(pixels):
            raise UserError(f"{name}: has no transparent part; use cutout=grabcut or give a cut-out with transparency")
        return _checked(pixels, f"{name}: empty cut-out, all is transparent; give a picture that shows the subject")
    empty = f"{name}: empty cut-out, no subject stands out; give a picture with transparent background or a :mask="
    if int(np.ptp(pixels[..., :3].reshape(-1, 3), axis=0).max()) <= 2:
        raise UserError(empty)  # one flat colour: nothing for GrabCut to tell apart
    pixels[..., 3] = grabcut_alpha(pixels[..., :3])
    return _checked(pixels, empty)


def grabcut_alpha(rgb: Pixels) -> Pixels:
    """Alpha of the thing in the middle, by GrabCut started from a frame of background.

    Args:
        rgb: (H, W, 3) uint8.
    Returns:
        (H, W) uint8 0..255, all 0 where nothing was found; the same for the same picture.
    """
    height, width = rgb.shape[:2]
    scale = min(1.0, GRABCUT_SIDE / max(height, width))
    small = cv2.resize(rgb, (max(8, round(width * scale)), max(8, round(height * scale))), interpolation=cv2.INTER_AREA)
    rows, columns = small.shape[:2]
    top, left = max(1, round(rows * BORDER_SHARE)), max(1, round(columns * BORDER_SHARE))
    labels = np.zeros((rows, columns), np.uint8)
    cv2.setRNGSeed(0)  # its colour clusters start at random
    cv2.grabCut(
        cv2.cvtColor(small, cv2.COLOR_RGB2BGR),
        labels,
        (left, top, columns - 2 * left, rows - 2 * top),
        np.zeros((1, 65)),
        np.zeros((1, 65)),
        GRABCUT_ROUNDS,
        cv2.GC_INIT_WITH_RECT,
    )
    subject = _without_islands(np.isin(labels, (cv2.GC_FGD, cv2.GC_PR_FGD)))
    alpha = cv2.resize(subject.astype(np.uint8) * 255, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(alpha, np.uint8)


def _without_islands(subject: NDArray[np.bool_]) -> NDArray[np.bool_]:
    count, labels, stats, _ = cv2.connectedComponentsWithStats(subject.astype(np.uint8), connectivity=8)
    if count <= 1:
        return subject
    areas = stats[:, cv2.CC_STAT_AREA].copy()
    areas[0] = 0  # the background
    return np.isin(labels, np.flatnonzero(areas >= MIN_ISLAND_SHARE * areas.max()))


def _hides_something(pixels: Pixels) -> bool:
    """True where the alpha channel says something: at least a thousandth of the pixels is transparent."""
    return bool((pixels[..., 3] < 128).mean() >= 0.001)


def _checked(pixels: Pixels, empty: str) -> Image.Image:
    if (pixels[..., 3] >= 128).mean() < MIN_SUBJECT_SHARE:
        raise UserError(empty)
    return Image.fromarray(pixels)


def _eight_bit(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith(("I", "F")):  # 16 or 32 bits a number: Pillow's own conversion clips instead of scaling
        values = np.asarray(picture, np.float64)
        top = 65535.0 if values.max() > 255 else 255.0
        picture = Image.fromarray(np.clip(values * (255.0 / top), 0, 255).astype(np.uint8))
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def _bounded(picture: Image.Image) -> Image.Image:
    if max(picture.size) > MAX_SIDE:
        picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return picture
