"""Makes the picture that is stored from the bytes that a source gives, whatever they are, or says why not.

Content decides the format, never a name. Size is judged from the header, before anything is decoded. The stored JPEG
is the original one when nothing has to be done to it; the pixels are decoded from exactly the stored bytes.
Decisions: transparent pictures stand on white (as a page shows them); of animations and pages the first is taken (as
published pipelines do); 16-bit grey keeps its upper byte; colour profiles become sRGB; metadata does not survive.
A decoder can still be slow on hostile bytes: the engine runs this in processes that it can end.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError
from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.settings import Settings

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no other decoder is tried; MPO comes as JPEG

ImageReason = Literal[
    "image_empty",  # no bytes
    "image_too_many_bytes",
    "image_unknown_format",  # none of FORMATS: HTML, SVG, PDF, video …
    "image_too_large",  # more pixels than may be decoded
    "image_too_small",  # longer side below the rule's
    "image_too_narrow",  # one side many times the other
    "image_unsupported",  # floating point or more than 16 bits
    "image_corrupt",  # truncated or damaged
]
IMAGE_REASONS: tuple[str, ...] = get_args(ImageReason)

# Orientation of EXIF (TIFF 6, tag 274) -> what puts the picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112
_MAX_STORED_PIXELS = 100_000_000


class ImageSettings(Settings):
    """What is accepted, and how it is stored."""

    max_bytes: int = Field(50_000_000, ge=1)  # of the source's file
    max_pixels: int = Field(64_000_000, ge=1, le=170_000_000)  # of the source, before decoding; Pillow's own end: 178 M
    max_aspect_ratio: float = Field(10.0, ge=1)  # longer side / shorter side
    max_side_px: int = Field(1024, ge=8, le=10_000)  # the stored picture is scaled down to it
    jpeg_quality: int = Field(95, ge=1, le=100)  # when it is encoded anew; colour is kept at full resolution


class PictureRefused(Exception):
    """A picture that cannot be used, with one of `IMAGE_REASONS` and a line for a person."""

    def __init__(self, reason: ImageReason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class PreparedPicture:
    """A picture ready to be stored."""

    jpeg: bytes  # to be stored
    pixels: np.ndarray  # (H, W, 3) uint8 RGB, decoded from `jpeg`
    width: int  # of the stored picture, pixels
    height: int
    source_width: int  # as its header says, before any rotation
    source_height: int
    sha256: str  # of the source's bytes
    perceptual_hash: int  # 64 bit, of `pixels`


def prepare_picture(data: bytes, limits: ImageSettings, min_longer_side_px: int = 0) -> PreparedPicture:
    """Check, decode, turn upright, convert to RGB, scale down, encode.

    Args:
        min_longer_side_px: the rule's least size; known here already, so that nothing is decoded in vain.

    Raises:
        PictureRefused: with a reason of `IMAGE_REASONS`; nothing else, whatever the bytes are.
    """
    if not data:
        raise PictureRefused("image_empty")
    if len(data) > limits.max_bytes:
        raise PictureRefused("image_too_many_bytes", f"{len(data)} bytes; at most {limits.max_bytes}")
    with _refusing(), _opened(data) as image:
        _check_size(image, limits, min_longer_side_px)
        if image.format == "PNG":
            _opened(data).verify()  # checksums: damaged data may still unpack, to a black picture
        source_width, source_height = image.size
        if _may_be_kept(image, data, limits):
            jpeg, pixels = data, np.array(image)
        else:
            jpeg = _encoded(_upright_rgb(image, limits.max_side_px), limits.jpeg_quality)
            pixels = np.array(Image.open(io.BytesIO(jpeg), formats=("JPEG",)))
    return PreparedPicture(
        jpeg=jpeg,
        pixels=pixels,
        width=pixels.shape[1],
        height=pixels.shape[0],
        source_width=source_width,
        source_height=source_height,
        sha256=hashlib.sha256(data).hexdigest(),
        perceptual_hash=perceptual_hash(pixels),
    )


def perceptual_hash(pixels: np.ndarray) -> int:
    """64 bits that change little when a picture is scaled or encoded again: signs of its lowest 8 x 8 frequencies.

    pHash as ImageHash computes it; `duplicates.py` compares them.
    """
    import imagehash

    return int(str(imagehash.phash(Image.fromarray(pixels))), 16)


def decode_stored(jpeg: bytes, where: str) -> np.ndarray:
    """Pixels of a stored picture, (H, W, 3) uint8 RGB.

    Raises:
        UserError: it is not a whole RGB JPEG.
    """
    return _decode(jpeg, "JPEG", "RGB", where)


def decode_reference(png: bytes, where: str) -> np.ndarray:
    """Pixels of a reference cut-out, (h, w, 4) uint8 RGBA.

    Raises:
        UserError: it is not a whole RGBA PNG.
    """
    return _decode(png, "PNG", "RGBA", where)


def _decode(data: bytes, kind: str, mode: str, where: str) -> np.ndarray:
    try:
        with _quiet(), Image.open(io.BytesIO(data), formats=(kind,)) as image:
            if image.mode != mode or image.width * image.height > _MAX_STORED_PIXELS:
                found = f"{image.mode}, {image.width} x {image.height} pixels"
                raise UserError(f"{where}: {found}; expected a {kind} of mode {mode}, at most {_MAX_STORED_PIXELS}")
            return np.array(image)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where}: cannot be decoded as {kind} ({_one_line(error)})") from error


@contextmanager
def _refusing() -> Iterator[None]:
    """Decoders raise whatever comes to them (struct.error, IndexError, SyntaxError …): all of it is a bad picture."""
    with _quiet():
        try:
            yield
        except PictureRefused:
            raise
        except UnidentifiedImageError as error:
            raise PictureRefused("image_unknown_format", "none of " + ", ".join(FORMATS)) from error
        except Image.DecompressionBombError as error:
            raise PictureRefused("image_too_large", _one_line(error)) from error
        except Exception as error:
            raise PictureRefused("image_corrupt", _one_line(error)) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """What Pillow warns of (damaged EXIF, many pixels) is decided here; ten million warnings help nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except (OverflowError, ValueError, MemoryError) as error:
        raise PictureRefused("image_corrupt", _one_line(error)) from error


def _check_size(image: Image.Image, limits: ImageSettings, min_longer_side_px: int) -> None:
    width, height = image.size
    size = f"{width} x {height} pixels"
    if width < 1 or height < 1:
        raise PictureRefused("image_corrupt", size)
    if width * height > limits.max_pixels:
        raise PictureRefused("image_too_large", f"{size}; at most {limits.max_pixels} in all")
    if max(width, height) < min_longer_side_px:
        raise PictureRefused("image_too_small", f"{size}; the longer side has at least {min_longer_side_px}")
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise PictureRefused("image_too_narrow", f"{size}; at most {limits.max_aspect_ratio:g} : 1")


def _may_be_kept(image: Image.Image, data: bytes, limits: ImageSettings) -> bool:
    """A plain RGB JPEG of the right size that says nothing but its picture (no EXIF, profile, comment, trailer)."""
    if image.format != "JPEG" or image.mode != "RGB" or max(image.size) > limits.max_side_px:
        return False
    said = getattr(image, "applist", [])
    plain = all(
        (name == "APP0" and text[:4] == b"JFIF") or (name == "APP14" and text[:5] == b"Adobe") for name, text in said
    )
    return plain and data.endswith(b"\xff\xd9") and len(data) <= 3 * image.width * image.height + 4096


def _upright_rgb(image: Image.Image, max_side: int) -> Image.Image:
    """The first picture of the file: scaled down, upright, sRGB, on white."""
    orientation, profile = _orientation(image), image.info.get("icc_profile")
    scale = min(1.0, max_side / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if image.format == "JPEG" and scale < 1:
        image.draft(None, (3 * size[0] // 2, 3 * size[1] // 2))  # at 1/2, 1/4 or 1/8, still 1.5 times the target
    image.load()
    image = _eight_bit(image)
    transparent = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if transparent:
        layer = image.convert("RGBA")
        image = Image.new("RGB", layer.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    image = _in_srgb(image, profile)
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise PictureRefused("image_unsupported", "floating-point pixels")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)  # (H, W) uint16 or int32
    if values.min() < 0 or values.max() > 65535:
        raise PictureRefused("image_unsupported", "more than 16 bits")
    return Image.fromarray((values >> 8).astype(np.uint8))


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours as sRGB means them; a profile that cannot be used is passed over, as viewers do."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
                if converted is not None:
                    return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF: the picture is as it is
        return 1


def _encoded(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.info = {}  # Pillow would write the source's comment
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def _one_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
