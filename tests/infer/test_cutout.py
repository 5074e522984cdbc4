"""How a picture loses its background, and which pictures are refused."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import UserError
from infer.cutout import MAX_SIDE, cut_out, load_picture


def photo(size: int = 120, noise: int = 12) -> tuple[Image.Image, np.ndarray]:
    """A red disc on a noisy green ground, and the disc's true mask."""
    random = np.random.default_rng(0)
    pixels = np.full((size, size, 3), (60, 130, 70), np.int16)
    mask = np.zeros((size, size), np.uint8)
    cv2.circle(mask, (size // 2, size // 2), size // 4, 1, -1)
    pixels[mask == 1] = (200, 50, 40)
    pixels += random.integers(-noise, noise + 1, pixels.shape, dtype=np.int16)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)), mask == 1


def overlap(cutout: Image.Image, mask: np.ndarray) -> float:
    alpha = np.array(cutout)[..., 3] >= 128
    return float((alpha & mask).sum() / (alpha | mask).sum())


def test_the_alpha_channel_is_taken_as_it_is() -> None:
    picture, mask = photo()
    picture.putalpha(Image.fromarray(mask.astype(np.uint8) * 200))
    assert np.array_equal(np.array(cut_out(picture)), np.array(picture))


def test_grabcut_finds_the_thing_in_the_middle_of_a_photo() -> None:
    picture, mask = photo()
    assert overlap(cut_out(picture), mask) > 0.95


def test_an_opaque_alpha_channel_says_nothing_and_grabcut_is_used() -> None:
    picture, mask = photo()
    assert overlap(cut_out(picture.convert("RGBA")), mask) > 0.95


def test_grabcut_gives_the_same_cutout_each_time() -> None:
    picture, _ = photo()
    assert cut_out(picture).tobytes() == cut_out(picture).tobytes()


def test_a_given_mask_of_another_size_wins() -> None:
    picture, _ = photo()
    mask = Image.new("L", (60, 60))
    mask.paste(255, (0, 0, 30, 60))
    alpha = np.array(cut_out(picture, mask=mask))[..., 3]
    assert alpha[:, :58].min() == 255 and alpha[:, 62:].max() == 0


def test_none_keeps_the_whole_picture() -> None:
    assert np.array(cut_out(photo()[0], method="none"))[..., 3].min() == 255


def test_alpha_alone_refuses_a_picture_without_it() -> None:
    with pytest.raises(UserError, match="has no transparent part"):
        cut_out(photo()[0], method="alpha", name="dog.jpg")


@pytest.mark.parametrize(
    "picture",
    [Image.new("RGBA", (50, 50), (255, 0, 0, 0)), Image.new("RGB", (50, 50), (90, 90, 90))],
    ids=["transparent everywhere", "one flat colour"],
)
def test_an_empty_cutout_is_refused_by_name(picture: Image.Image) -> None:
    with pytest.raises(UserError, match="dog.png: empty cut-out"):
        cut_out(picture, name="dog.png")


def test_a_black_mask_is_refused() -> None:
    with pytest.raises(UserError, match="the mask marks nothing"):
        cut_out(photo()[0], mask=Image.new("L", (10, 10)), name="dog.png")


def test_a_photo_taken_upright_is_read_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    Image.new("RGB", (40, 20)).save(tmp_path / "phone.jpg", exif=exif)
    assert load_picture(tmp_path / "phone.jpg").size == (20, 40)


def test_a_huge_picture_is_read_small(tmp_path: Path) -> None:
    Image.new("RGB", (3000, 1500)).save(tmp_path / "huge.png")
    assert load_picture(tmp_path / "huge.png").size == (MAX_SIDE, MAX_SIDE // 2)


def test_sixteen_bit_grey_keeps_its_brightness(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 32896, np.uint16)).save(tmp_path / "deep.png")
    assert np.array(load_picture(tmp_path / "deep.png")).flat[0] == 128


def test_cmyk_palette_and_animated_files_are_read(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8)).save(tmp_path / "print.jpg")
    Image.new("P", (8, 8)).save(tmp_path / "palette.gif")
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert load_picture(tmp_path / "print.jpg").mode == "RGB"
    assert load_picture(tmp_path / "palette.gif").mode == "RGB"
    assert load_picture(tmp_path / "moving.webp").getpixel((0, 0)) == (255, 0, 0)


def test_unreadable_files_are_told_apart(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "nothing.png").touch()
    for name, complaint in {
        "absent.png": "no such file",
        "text.png": "not a picture",
        "nothing.png": "not a picture",
        "cut.png": "damaged",
        ".": "is a folder",
    }.items():
        with pytest.raises(UserError, match=complaint) as error:
            load_picture(tmp_path / name)
        assert "\n" not in str(error.value)
