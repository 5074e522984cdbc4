"""A folder as a source: order, keys, captions, metadata, pairs, and everything that can be wrong with them."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.record import Drop
from data_pipeline.sources import SourceSample
from data_pipeline.sources.folder import FolderSettings
from data_pipeline.sources.keys import clean_key, faithful_key, unique_keys
from tests.data_pipeline.sources.picture_server import picture_bytes


def write(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def answers(path: Path | str, **keys: Any) -> dict[str, SourceSample | Drop]:
    source = FolderSettings(path=str(path), **keys).open()
    return {answer.key: answer for unit in source.units() for answer in source.samples(unit)}


def only(path: Path, **keys: Any) -> SourceSample | Drop:
    (answer,) = answers(path, **keys).values()
    return answer


def test_units_hold_shard_size_pictures_in_the_order_of_their_paths(tmp_path: Path) -> None:
    write(tmp_path, {name: b"x" for name in ("b.JPG", "a/z.png", "c.webp", "notes.md", ".hidden.jpg", ".cache/d.jpg")})
    units = FolderSettings(path=str(tmp_path), shard_size=2).open().units()
    assert [(unit.name, unit.count) for unit in units] == [("00000", 2), ("00001", 1)]
    assert [row[0] for unit in units for row in unit.parts["pictures"]] == ["a/z.png", "b.JPG", "c.webp"]
    assert json.loads(json.dumps(units[0].parts)) == units[0].parts


def test_subfolders_are_left_alone_when_not_recursive(tmp_path: Path) -> None:
    write(tmp_path, {"a.jpg": b"x", "sub/b.jpg": b"x"})
    assert list(answers(tmp_path, recursive=False)) == ["a"]


def test_captions_and_metadata_stand_beside_the_picture(tmp_path: Path) -> None:
    picture = picture_bytes()
    told = {
        "url": "http://a/1",
        "TEXT": "from the table",
        "AESTHETIC_SCORE": 6,
        "punsafe": float("nan"),
        "scores": {"x": 1},
    }
    write(tmp_path, {"one.jpg": picture, "one.txt": "\ufeffa dog\n on  grass\n", "one.json": json.dumps(told)})
    write(tmp_path, {"two.png": picture, "two.json": json.dumps({"caption": "a cat", "sha256": "AB" * 32})})
    found = answers(tmp_path)
    assert found["one"] == SourceSample("one", picture, "a dog on grass", "http://a/1", {"x": 1.0, "aesthetic": 6.0})
    assert found["two"] == SourceSample("two", picture, "a cat", sha256="ab" * 32)
    assert [sample.alt_text for sample in answers(tmp_path, captions=None).values()] == ["from the table", "a cat"]


def test_keys_are_readable_and_unique_whatever_the_files_are_called(tmp_path: Path) -> None:
    names = ["Más fotos/cat 1.jpg", "Más fotos/cat_1.jpg", "cat.jpg", "cat.png", "日本.jpg", "x" * 150 + ".jpg"]
    write(tmp_path, {name: b"x" for name in names})
    keys = list(answers(tmp_path))
    assert len(keys) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,120}", key) for key in keys)
    assert sum(key.startswith("Mas_fotos_cat_1-") for key in keys) == 2


def test_other_files_do_not_change_a_key(tmp_path: Path) -> None:
    write(tmp_path, {"b/cat 1.jpg": b"x"})
    before = list(answers(tmp_path))
    write(tmp_path, {"a/dog.jpg": b"x", "c.jpg": b"x"})
    assert before == ["b_cat_1"] and set(before) < set(answers(tmp_path))


def test_a_name_made_to_collide_with_a_hashed_key_gets_a_longer_hash() -> None:
    hashed = unique_keys(["a b", "a_b"], ["a b", "a_b"])[0]
    assert len(set(unique_keys(["a b", "a_b", hashed], ["a b", "a_b", hashed]))) == 3
    assert clean_key("..") == "picture" and faithful_key("a.b") != faithful_key("a_b") == "a_b"


def test_files_that_cannot_be_read_are_dropped(tmp_path: Path) -> None:
    write(tmp_path, {"big.jpg": bytes(2000), "loop/a.jpg": b"x"})
    os.symlink(tmp_path / "nowhere", tmp_path / "gone.jpg")
    os.symlink(tmp_path, tmp_path / "loop" / "again")
    os.mkfifo(tmp_path / "pipe.jpg")
    found = answers(tmp_path, max_image_mb=0.001)
    reasons = {key: answer.reason for key, answer in found.items() if isinstance(answer, Drop)}
    assert reasons == {"big": "too_large", "gone": "unreadable", "pipe": "unreadable"}
    assert isinstance(found["loop_a"], SourceSample)


def test_nothing_to_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"source.path=.*none: no such folder"):
        FolderSettings(path=str(tmp_path / "none")).open()
    with pytest.raises(UserError, match="no pictures there; expected files that end in .jpg"):
        FolderSettings(path=str(tmp_path)).open().units()
    with pytest.raises(UserError, match="source.path=nothing://x"):
        FolderSettings(path="nothing://x").open()


def test_object_stores_are_read_like_folders() -> None:
    store = fsspec.filesystem("memory")
    store.pipe({"/photos/a/1.jpg": b"one", "/photos/a/1.txt": b"a dog", "/photos/2.png": b"two"})
    found = answers("memory://photos")
    assert {
        key: (answer.image, answer.alt_text) for key, answer in found.items() if isinstance(answer, SourceSample)
    } == {
        "2": (b"two", ""),
        "a_1": (b"one", "a dog"),
    }


def pair(**changes: Any) -> str:
    entity = {"noun": "dog", "phrase": "a dog", "box_xyxy_px": [4, 2, 20.5, 99], "mask": "dog.mask0.png"}
    return json.dumps({"entities": [{**entity, "subject_id": "rex", "references": ["../_cutouts/rex.png"], **changes}]})


def write_pair(root: Path, sidecar: str) -> Path:
    mask = np.zeros((24, 32), bool)
    mask[3:20, 5:18] = True
    cutout = np.full((8, 8, 4), 200, np.uint8)
    files = {"set/dog.jpg": picture_bytes(), "set/dog.mask0.png": png(mask), "_cutouts/rex.png": png(cutout)}
    return write(root, {**files, "_cutouts/rgb.png": png(cutout[..., :3]), "set/dog.json": sidecar})


def test_pairs_made_elsewhere_are_imported(tmp_path: Path) -> None:
    sample = only(write_pair(tmp_path, pair()))
    assert isinstance(sample, SourceSample) and sample.given is not None
    (entity,) = sample.given
    assert (entity.noun, entity.phrase, entity.subject_id) == ("dog", "a dog", "rex")
    assert entity.box_xyxy_px == (4, 2, 20.5, 24)  # cut to the picture
    mask = np.asarray(Image.open(io.BytesIO(entity.mask_png or b"")))
    assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255} and (mask > 0).sum() == 17 * 13
    assert entity.references == ((tmp_path / "_cutouts/rex.png").read_bytes(),)


def test_an_empty_list_of_entities_is_an_answer_too(tmp_path: Path) -> None:
    sample = only(write_pair(tmp_path, '{"entities": []}'))
    assert isinstance(sample, SourceSample) and sample.given == ()


def test_boxes_and_masks_belong_to_the_picture_as_it_is_shown(tmp_path: Path) -> None:
    write_pair(tmp_path, pair(box_xyxy_px=[0, 0, 20, 30], mask=None))
    sideways = Image.open(io.BytesIO(picture_bytes()))
    exif = sideways.getexif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "set/dog.jpg", exif=exif)
    sample = only(tmp_path)
    assert isinstance(sample, SourceSample) and sample.given is not None
    assert sample.given[0].box_xyxy_px == (0, 0, 20, 30)  # 24 wide and 32 high


@pytest.mark.parametrize(
    ("sidecar", "told"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[1]", "expected an object, found a list"),
        ('{"entities": {}}', "expected a list"),
        ('{"entities": [3]}', "expected an object of"),
        (pair(colour="red"), "expected an object of"),
        (pair(noun=""), "noun: missing"),
        (pair(noun=3), "noun: expected text"),
        (pair(box_xyxy_px=None), "expected [x0, y0, x1, y1]"),
        (pair(box_xyxy_px=[1, 2, 3]), "expected [x0, y0, x1, y1]"),
        (pair(box_xyxy_px=[0, 0, float("inf"), 9]), "finite"),
        (pair(box_xyxy_px=[40, 2, 50, 9]), "outside the picture"),
        (pair(mask="../_cutouts/rex.png"), "no one-channel picture of 32 x 24"),
        (pair(mask="absent.png"), "not there"),
        (pair(mask="dog.jpg"), "no one-channel picture"),
        (pair(mask="/etc/hostname"), "leads out"),
        (pair(references=["../../secret.png"]), "leads out"),
        (pair(references=["../_cutouts/rgb.png"]), "RGBA"),
        (pair(references=["dog.jpg"]), "cannot be decoded"),
        (pair(references="rex.png"), "file names"),
    ],
)
def test_entities_that_do_not_fit_the_format_drop_the_picture(tmp_path: Path, sidecar: str, told: str) -> None:
    drop = only(write_pair(tmp_path, sidecar))
    assert isinstance(drop, Drop) and told in drop.detail
    assert drop.reason == ("unreadable" if told == "not there" else "bad_metadata")
