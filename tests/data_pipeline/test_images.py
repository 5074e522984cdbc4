"""Pictures from anywhere: accepted as an upright RGB JPEG, or refused with a reason of the list, nothing else."""

from __future__ import annotations

import hashlib
import io
import random
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from data_pipeline.errors import UserError
from data_pipeline.images import (
    IMAGE_REASONS,
    ImageSettings,
    PictureRefused,
    PreparedPicture,
    decode_reference,
    decode_stored,
    perceptual_hash,
    prepare_picture,
)

LIMITS = ImageSettings(max_side_px=128, max_pixels=1_000_000, max_bytes=2_000_000)


def scene(width: int = 96, height: int = 64) -> Image.Image:
    """A smooth picture: red grows to the right, green downwards; the upper left corner is blue."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)[None]
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    pixels[: height // 4, : width // 4] = (0, 0, 255)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    return encoded(image or scene(), "JPEG", **{"quality": 95, **options})


def png(image: Image.Image | None = None, **options: Any) -> bytes:
    return encoded(image or scene(), "PNG", **options)


def refused(data: bytes, limits: ImageSettings = LIMITS, **options: int) -> PictureRefused:
    with pytest.raises(PictureRefused) as caught:
        prepare_picture(data, limits, **options)
    assert caught.value.reason in IMAGE_REASONS and "\n" not in caught.value.detail
    return caught.value


def close(prepared: PreparedPicture, image: Image.Image, tolerance: float = 3.0) -> bool:
    """Whether the stored picture looks like `image`."""
    expected = np.asarray(image.convert("RGB"), dtype=float)
    return prepared.pixels.shape == expected.shape and np.abs(prepared.pixels - expected).mean() < tolerance


def test_a_plain_jpeg_is_stored_as_it_came() -> None:
    data = jpeg()
    prepared = prepare_picture(data, LIMITS)
    assert prepared.jpeg == data and prepared.sha256 == hashlib.sha256(data).hexdigest()
    assert (prepared.width, prepared.height, prepared.source_width, prepared.source_height) == (96, 64, 96, 64)
    assert prepared.perceptual_hash == perceptual_hash(prepared.pixels) < 2**64


@pytest.mark.parametrize("data", [jpeg(), jpeg(scene(300, 200)), png(), jpeg(comment=b"x")])
def test_pixels_are_those_of_the_stored_bytes(data: bytes) -> None:
    prepared = prepare_picture(data, LIMITS)
    assert (decode_stored(prepared.jpeg, "x") == prepared.pixels).all() and prepared.pixels.dtype == np.uint8
    assert prepare_picture(data, LIMITS).jpeg == prepared.jpeg


@pytest.mark.parametrize(
    "data",
    [
        jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
        jpeg(comment=b"made by somebody"),
        jpeg(xmp=b"<x/>"),
        jpeg(icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
        jpeg() + b"PK\x03\x04 a zip behind the picture",
        jpeg(scene().convert("L")),
    ],
    ids=["exif", "comment", "xmp", "profile", "trailer", "grey"],
)
def test_a_jpeg_that_says_more_than_its_picture_is_encoded_anew(data: bytes) -> None:
    prepared = prepare_picture(data, LIMITS)
    assert prepared.jpeg != data
    stored = Image.open(io.BytesIO(prepared.jpeg))
    assert stored.mode == "RGB" and {name for name, _ in stored.applist} == {"APP0"}  # type: ignore[attr-defined]
    assert close(prepared, Image.open(io.BytesIO(data)))


def test_a_large_picture_is_scaled_to_the_longer_side() -> None:
    prepared = prepare_picture(jpeg(scene(600, 400)), LIMITS)
    assert (prepared.width, prepared.height) == (128, 85)
    assert (prepared.source_width, prepared.source_height) == (600, 400)
    assert close(prepared, scene(128, 85), 5)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(96, 64), (300, 200)])
def test_exif_rotation_is_applied(orientation: int, size: tuple[int, int]) -> None:
    """Pillow's own transposition is the reference."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(scene(*size), exif=exif)
    prepared = prepare_picture(data, LIMITS)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    scale = min(1, 128 / max(upright.size))
    assert close(prepared, upright.resize((round(upright.width * scale), round(upright.height * scale))), 4)
    assert (prepared.height > prepared.width) == (orientation >= 5)


def test_cmyk_is_not_inverted() -> None:
    prepared = prepare_picture(jpeg(scene().convert("CMYK")), LIMITS)
    assert close(prepared, scene(), 6)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_its_upper_byte(kind: str) -> None:
    ramp = np.linspace(0, 65535, 96).astype(np.uint16)[None].repeat(64, axis=0)
    prepared = prepare_picture(encoded(Image.fromarray(ramp), kind), LIMITS)
    assert np.abs(prepared.pixels[0, :, 0].astype(int) - (ramp[0] >> 8)).max() <= 3


def test_floating_point_is_refused() -> None:
    assert refused(encoded(Image.new("F", (64, 64)), "TIFF")).reason == "image_unsupported"


def transparent() -> Image.Image:
    """Red on the left half; on the right fully transparent, over hidden green."""
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[:, :32] = (255, 0, 0, 255)
    pixels[:, 32:] = (0, 255, 0, 0)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    "data",
    [
        png(transparent()),
        encoded(transparent(), "WEBP", lossless=True, exact=True),
        encoded(transparent(), "TIFF"),
        encoded(transparent(), "GIF"),
        png(transparent().quantize(8)),
    ],
    ids=["png", "webp", "tiff", "gif", "palette png"],
)
def test_transparency_becomes_white(data: bytes) -> None:
    pixels = prepare_picture(data, LIMITS).pixels
    assert np.abs(pixels[:, 40:].astype(int) - 255).max() <= 8
    assert np.abs(pixels[:, :24].astype(int) - (255, 0, 0)).max() <= 8


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_picture_is_taken(kind: str) -> None:
    frames = [scene(), Image.new("RGB", (96, 64), "white")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    assert close(prepare_picture(data, LIMITS), scene(), 12)  # GIF: 256 colours


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "I;16", "RGBA", "RGB"])
def test_every_common_mode_gives_rgb(mode: str) -> None:
    image = Image.new("I;16", (64, 64), 40000) if mode == "I;16" else scene(64, 64).convert(mode)
    assert prepare_picture(png(image), LIMITS).pixels.shape == (64, 64, 3)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG"])
def test_content_decides_the_format(kind: str) -> None:
    assert prepare_picture(encoded(scene(), kind), LIMITS).jpeg.startswith(b"\xff\xd8\xff")


def test_colour_profiles_become_srgb() -> None:
    """A profile with red and blue exchanged: what it calls red is blue."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exchanged = srgb.replace(b"rXYZ", b"tmp_").replace(b"bXYZ", b"rXYZ").replace(b"tmp_", b"bXYZ")
    exchanged = exchanged.replace("sRGB".encode("utf-16-be"), "none".encode("utf-16-be")).replace(b"sRGB", b"none")
    red = Image.new("RGB", (32, 32), (255, 0, 0))
    assert prepare_picture(png(red, icc_profile=exchanged), LIMITS).pixels[5, 5].argmax() == 2
    assert prepare_picture(png(red, icc_profile=srgb), LIMITS).pixels[5, 5].argmax() == 0
    assert prepare_picture(png(red, icc_profile=b"no profile at all"), LIMITS).pixels[5, 5].argmax() == 0


def test_sizes_are_judged_before_decoding() -> None:
    broken = jpeg(scene(300, 200))[:900]  # the header is whole, the picture is not
    assert refused(broken).reason == "image_corrupt"
    assert refused(broken, min_longer_side_px=301).reason == "image_too_small"
    assert refused(broken, ImageSettings(max_pixels=59_999)).reason == "image_too_large"
    assert prepare_picture(jpeg(scene(300, 200)), LIMITS, min_longer_side_px=300).width == 128


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def with_text(size: int) -> bytes:
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * size, zip=True)
    return png(pnginfo=text)


BAD = {
    "nothing": (b"", "image_empty"),
    "one zero": (b"\0", "image_unknown_format"),
    "zeros": (bytes(5000), "image_unknown_format"),
    "html": (b"<!doctype html><html><body>404</body></html>", "image_unknown_format"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"><script/></svg>', "image_unknown_format"),
    "pdf": (b"%PDF-1.7\n1 0 obj\n", "image_unknown_format"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "image_unknown_format"),
    "ico": (encoded(Image.new("RGB", (32, 32)), "ICO"), "image_unknown_format"),
    "ppm": (encoded(scene(), "PPM"), "image_unknown_format"),
    "tga": (encoded(scene(), "TGA"), "image_unknown_format"),
    "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", "image_unknown_format"),
    "mp4": (b"\0\0\0\x18ftypmp42", "image_unknown_format"),
    "too many bytes": (jpeg() + bytes(2_000_000), "image_too_many_bytes"),
    "bomb": (png_header(60_000, 60_000), "image_too_large"),
    "large for us": (png_header(2000, 2000), "image_too_large"),
    "1 x 100000": (png_header(1, 100_000), "image_too_narrow"),
    "100000 x 1 gif": (b"GIF89a" + struct.pack("<HH", 65535, 1) + b"\0\0\0;", None),
    "width 0": (png_header(0, 64), None),
    "height 0 gif": (b"GIF89a" + struct.pack("<HH", 64, 0) + b"\0\0\0;", None),
    "negative bmp": (b"BM" + struct.pack("<IHHIIiiHH", 99, 0, 0, 54, 40, -64, -64, 1, 24) + bytes(60), None),
    "png without data": (png_header(64, 64), "image_corrupt"),
    "png of text": (with_text(90_000_000), None),
    "truncated jpeg": (jpeg()[:-300], "image_corrupt"),
    "truncated png": (png()[:-100], "image_corrupt"),
    "truncated webp": (encoded(scene(), "WEBP")[:-100], "image_corrupt"),
    "truncated gif": (encoded(scene(), "GIF")[:-1000], "image_corrupt"),
    "truncated tiff": (encoded(scene(), "TIFF")[:-1000], "image_corrupt"),
    "truncated bmp": (encoded(scene(), "BMP")[:-1000], "image_corrupt"),
    "half a header": (jpeg()[:20], None),
    "png with other bytes": (png()[:200] + b"\xff\xff\xff" + png()[203:], "image_corrupt"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_picture_is_refused_with_its_reason(name: str) -> None:
    data, reason = BAD[name]
    found = refused(data, LIMITS).reason
    assert reason in (None, found)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage"),
        jpeg(exif=b"Exif\0\0" + bytes(range(256))),
        with_text(900_000),
        jpeg(xmp=b"<" * 60_000),
        png(transparency=(0, 0, 255)),
    ],
    ids=["exif offset", "exif noise", "png text", "xmp noise", "transparent colour"],
)
def test_what_stands_beside_the_picture_does_not_hurt(data: bytes) -> None:
    assert prepare_picture(data, LIMITS).pixels.shape == (64, 96, 3)


GOOD = {
    "jpeg": jpeg(),
    "large jpeg": jpeg(scene(300, 200)),
    "progressive jpeg": jpeg(progressive=True),
    "cmyk jpeg": jpeg(scene().convert("CMYK")),
    "exif jpeg": jpeg(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    "png": png(),
    "palette png": png(transparent().quantize(8)),
    "16-bit png": png(Image.new("I;16", (64, 64), 40000)),
    "webp": encoded(scene(), "WEBP"),
    "lossless webp": encoded(scene(), "WEBP", lossless=True),
    "animated webp": encoded(scene(), "WEBP", save_all=True, append_images=[Image.new("RGB", (96, 64))]),
    "gif": encoded(scene(), "GIF"),
    "bmp": encoded(scene(), "BMP"),
    "tiff": encoded(scene(), "TIFF"),
    "lzw tiff": encoded(scene(), "TIFF", compression="tiff_lzw"),
    "jpeg tiff": encoded(scene(), "TIFF", compression="jpeg"),
}


def _flip(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 3, 20, 200])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def _in_header(data: bytearray, rng: random.Random) -> bytes:
    for _ in range(rng.choice([1, 4])):
        data[rng.randrange(min(64, len(data)))] = rng.choice([0, 1, 127, 128, 255])
    return bytes(data)


def _cut_out(data: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    del data[start : start + rng.randrange(1, 400)]
    return bytes(data)


def _twice(data: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    part = data[start : start + rng.randrange(1, 400)]
    return bytes(data[:start] + part * rng.randrange(2, 40) + data[start:])


def _cut(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def _mixed(data: bytearray, rng: random.Random) -> bytes:
    other = rng.choice(list(GOOD.values()))
    return bytes(data[: rng.randrange(len(data))]) + other[rng.randrange(len(other)) :]


def _filled(data: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.randrange(1, 300))
    data[start:end] = bytes([rng.choice([0, 255])]) * (end - start)
    return bytes(data)


MUTATIONS: list[Callable[[bytearray, random.Random], bytes]] = [
    _flip,
    _in_header,
    _cut_out,
    _twice,
    _cut,
    _mixed,
    _filled,
]


@pytest.mark.parametrize("name", GOOD)
def test_the_pictures_that_are_mutated_are_good(name: str) -> None:
    assert prepare_picture(GOOD[name], LIMITS).pixels.ndim == 3


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutated_pictures_are_accepted_or_refused_and_nothing_else(
    name: str, mutation: Callable[[bytearray, random.Random], bytes]
) -> None:
    """16 kinds of picture, 7 of damage; 200 seeds of each damage in all."""
    for seed in range(200 // len(GOOD) + 1):
        data = mutation(bytearray(GOOD[name]), random.Random(f"{name} {mutation.__name__} {seed}"))
        try:
            prepared = prepare_picture(data, LIMITS)
        except PictureRefused as refusal:
            assert refusal.reason in IMAGE_REASONS and "\n" not in refusal.detail
        else:
            assert prepared.pixels.shape == (prepared.height, prepared.width, 3)
            assert max(prepared.pixels.shape) <= 128 and prepared.jpeg.startswith(b"\xff\xd8\xff")
            assert (decode_stored(prepared.jpeg, "x") == prepared.pixels).all()


def test_stored_pictures_are_whole_rgb_jpegs_and_references_rgba_pngs() -> None:
    assert decode_reference(png(transparent()), "x").shape == (64, 64, 4)
    for data in (png(), jpeg(scene().convert("L")), jpeg()[:-300], b"", b"x" * 100):
        with pytest.raises(UserError, match="^00000.tar: k.jpg: "):
            decode_stored(data, "00000.tar: k.jpg")
    for data in (png(), jpeg(), png(transparent())[:-30], png_header(60_000, 60_000)):
        with pytest.raises(UserError, match="^k.ref0.png: "):
            decode_reference(data, "k.ref0.png")
