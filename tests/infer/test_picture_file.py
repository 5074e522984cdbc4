"""PNG files that say how they were made, and a folder that is never overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.errors import UserError
from infer.picture_file import PictureRecord, open_output_folder, read_record, write_new, write_picture

RECORD = PictureRecord("a dög: “on” the beach", 7, "abc", {"steps": 2, "prompt": "ü"}, ({"noun": "dog", "box": None},))


def test_what_made_a_picture_is_read_back_from_it(tmp_path: Path) -> None:
    assert read_record(write_picture(tmp_path, Image.new("RGB", (8, 8)), RECORD)) == RECORD


def test_the_pixels_are_stored_without_loss(tmp_path: Path) -> None:
    picture = Image.effect_noise((16, 16), 80).convert("RGB")
    with Image.open(write_picture(tmp_path, picture, RECORD)) as read:
        assert read.tobytes() == picture.tobytes()


def test_pictures_are_numbered_on_from_the_highest_one_there(tmp_path: Path) -> None:
    picture = Image.new("RGB", (8, 8))
    (tmp_path / "00041.png").write_bytes(b"mine")
    (tmp_path / "holiday.png").touch()
    assert [write_picture(tmp_path, picture, RECORD).name for _ in range(2)] == ["00042.png", "00043.png"]
    assert (tmp_path / "00041.png").read_bytes() == b"mine"


def test_a_file_that_exists_is_left_alone_and_no_partial_file_stays(tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(b"old")
    assert not write_new(tmp_path / "grid.png", b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("grid.png", b"old")]


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        open_output_folder(tmp_path / "file" / "out")


def test_a_png_of_another_program_has_no_record(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    with pytest.raises(UserError, match="no complete record"):
        read_record(tmp_path / "other.png")
