"""The reader: whatever a tar holds, it ends with a sample or with one line that names file and member."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.record import Sample
from data_pipeline.shards.reader import decode_sample, list_shards, read_shard
from data_pipeline.shards.tar_members import END, MAX_MEMBER_BYTES, member_bytes
from data_pipeline.shards.writer import sample_members, write_shard
from tests.data_pipeline.shards.small_shards import FACTS, HEIGHT, WIDTH, cutout, items, picture, sample

Members = list[tuple[str, bytes]]


def members(number: int = 0) -> Members:
    return sample_members(sample(number), "test")


def written(folder: Path, parts: Members, end: bytes = END) -> Path:
    path = folder / "00000.tar"
    path.write_bytes(b"".join(member_bytes(name, data) for name, data in parts) + end)
    return path


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        list(read_shard(path))
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    return line


def test_only_shards_with_stats_are_finished(tmp_path: Path) -> None:
    for name in ("00001", "00000"):
        write_shard(tmp_path, name, items(prefix=name), FACTS)
    (tmp_path / "00002.tar").write_bytes(END)
    assert [shard.name for shard in list_shards(tmp_path)] == ["00000", "00001"]
    assert list_shards(tmp_path)[0].tar == str(tmp_path / "00000.tar")


def test_pixels_masks_and_references_are_decoded(tmp_path: Path) -> None:
    decoded = decode_sample(sample(0))
    assert decoded.pixels.shape == (HEIGHT, WIDTH, 3) and decoded.pixels.dtype == np.uint8
    assert decoded.masks.shape == (2, HEIGHT, WIDTH) and decoded.masks.dtype == bool
    assert decoded.masks.sum(axis=(1, 2)).tolist() == [40, 40] and decoded.masks[0, 5:13, 3:8].all()
    assert decoded.references["k000000.ref0.png"].shape == (6, 8, 4)
    assert decode_sample(sample(2)).masks.shape == (0, HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: replace(s, jpeg=s.jpeg[:-200]), "k000000.jpg: cannot be decoded as JPEG"),
        (lambda s: replace(s, jpeg=cutout()), "k000000.jpg: cannot be decoded as JPEG"),
        (lambda s: replace(s, record=replace(s.record, width=49)), "48 x 32 pixels; the record says 49 x 32"),
        (lambda s: replace(s, references={"k000000.ref0.png": picture(0)}), "ref0.png: cannot be decoded as PNG"),
    ],
)
def test_a_picture_that_is_not_as_recorded_is_refused(change: Callable[[Sample], Sample], told: str) -> None:
    with pytest.raises(UserError, match=told):
        decode_sample(change(sample(0)), "00000.tar")


def test_members_of_one_key_may_stand_in_any_order(tmp_path: Path) -> None:
    path = written(tmp_path, members()[::-1] + members(1))
    assert list(read_shard(path)) == [sample(0), sample(1)]


def test_a_shard_repacked_by_tar_is_read(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members():
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1_700_000_000, "somebody"
            tar.addfile(info, io.BytesIO(data))
    assert list(read_shard(path)) == [sample(0)]


@pytest.mark.parametrize(
    "name", ["../k.jpg", "/etc/k.jpg", "a/b.jpg", "k000000.exe", "k000000", ".jpg", "k.ref-1.png", "k\n.jpg", "k.x.jpg"]
)
def test_a_name_that_no_sample_has_is_refused(tmp_path: Path, name: str) -> None:
    assert "expected KEY.jpg" in refused(written(tmp_path, [*members(), (name, b"x")]))


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"x", b"L"],
)
def test_links_devices_folders_and_extended_headers_are_refused(tmp_path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("k000000.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    path = tmp_path / "00000.tar"
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + END)
    assert "'k000000.jpg' is not a plain file" in refused(path)


def test_an_oversized_member_is_refused_before_it_is_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("k000000.jpg")
    info.size = MAX_MEMBER_BYTES + 1
    path = tmp_path / "00000.tar"
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT))
    assert f"'k000000.jpg' has {MAX_MEMBER_BYTES + 1} bytes" in refused(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda parts: parts + parts[:1], "'k000000.jpg' stands there twice"),
        (lambda parts: parts + members(1) + parts[:1], "'k000000.jpg': its sample ended before"),
        (lambda parts: parts[1:], "k000000.jpg is missing"),
        (lambda parts: [parts[0], *parts[2:]], "k000000.txt is missing"),
        (lambda parts: parts[:2], "k000000.json is missing"),
        (lambda parts: parts[:3], "k000000.json: references: k000000.ref0.png is no member"),
        (lambda parts: [*parts, ("k000000.ref1.png", cutout())], "k000000.ref1.png: no entity names it"),
        (lambda parts: [(n, b"other" if n.endswith("txt") else d) for n, d in parts], "k000000.txt: not the caption"),
        (
            lambda parts: [(n.replace("k000000", "k000009"), d) for n, d in parts],
            "key='k000000': expected the member's",
        ),
        (lambda parts: [(n, b"{}" if n.endswith("json") else d) for n, d in parts], "k000000.json: schema_version"),
    ],
)
def test_a_sample_that_is_not_whole_is_refused(tmp_path: Path, change: Callable[[Members], Members], told: str) -> None:
    assert told in refused(written(tmp_path, change(members())))


def test_samples_before_the_damage_are_given(tmp_path: Path) -> None:
    path = written(tmp_path, members() + members(1), end=b"")
    reader = read_shard(path)
    assert next(reader) == sample(0)
    with pytest.raises(UserError, match="the file is cut short"):
        list(reader)


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, members())
    whole = path.read_bytes()
    for size in random.Random(0).sample(range(len(whole) - len(END)), 40):
        path.write_bytes(whole[:size])
        assert "cut short" in refused(path)


def test_random_damage_is_one_line_or_unseen_never_another_error(tmp_path: Path) -> None:
    path = written(tmp_path, members() + members(1))
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 30])):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            for found in read_shard(path):
                decode_sample(found, str(path))
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)


def test_what_is_no_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    path.write_bytes(b"<html>" * 1000)
    assert "no tar header at byte 0" in refused(path)
    path.unlink()
    assert "cannot be read (No such file or directory)" in refused(path)
