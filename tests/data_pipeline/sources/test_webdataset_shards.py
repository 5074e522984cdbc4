"""WebDataset shards as a source: what img2dataset writes, and tars that somebody made to do harm."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pandas
import pytest

from data_pipeline.errors import UserError
from data_pipeline.record import Drop
from data_pipeline.sources import SourceSample
from data_pipeline.sources.tar_groups import BrokenTar, read_groups
from data_pipeline.sources.webdataset_shards import WebDatasetSettings

Member = tuple[str, bytes]


def tar_bytes(members: Sequence[Member | tarfile.TarInfo], kind: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def sample_members(key: str, **metadata: Any) -> list[Member]:
    told = {"url": f"http://a/{key}", "status": "success", "key": key, **metadata}
    return [(f"{key}.jpg", key.encode()), (f"{key}.txt", b"a dog"), (f"{key}.json", json.dumps(told).encode())]


def answers(path: Path | str, **keys: Any) -> list[SourceSample | Drop]:
    source = WebDatasetSettings(paths=str(path), **keys).open()
    return [answer for unit in source.units() for answer in source.samples(unit)]


def read(tmp_path: Path, content: bytes, **keys: Any) -> list[SourceSample | Drop]:
    (tmp_path / "00000.tar").write_bytes(content)
    return answers(tmp_path, **keys)


def told(answers: Sequence[SourceSample | Drop]) -> list[tuple[str, str]]:
    """Key and reason, "" for a sample."""
    return [(answer.key, answer.reason if isinstance(answer, Drop) else "") for answer in answers]


def test_a_sample_is_its_picture_its_caption_and_what_is_known_of_it(tmp_path: Path) -> None:
    scores = {"similarity": 0.3, "punsafe": None, "pwatermark": "?", "AESTHETIC_SCORE": 5, "sha256": "0f" * 32}
    (sample,) = read(tmp_path, tar_bytes(sample_members("000000001", **scores)))
    assert sample == SourceSample(
        "000000001", b"000000001", "a dog", "http://a/000000001", {"similarity": 0.3, "aesthetic": 5.0}, None, "0f" * 32
    )


def test_members_of_a_key_come_in_any_order_and_others_are_passed_over(tmp_path: Path) -> None:
    folder = tarfile.TarInfo("part")
    folder.type = tarfile.DIRTYPE
    members: list[Member | tarfile.TarInfo] = [
        folder,
        ("part/b.TXT", b"two"),
        ("part/b.seg.png", b"no"),
        ("part/b.PNG", b"png"),
        ("part/b.cls", b"7"),
    ]
    (sample,) = read(tmp_path, tar_bytes([*members, ("README", b"hello")]))
    assert isinstance(sample, SourceSample) and (sample.image, sample.alt_text) == (b"png", "two")


def test_a_unit_is_a_tar_and_keeps_its_name(tmp_path: Path) -> None:
    for name in ("a/00007.tar", "a/00003.tar", "b/00007.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(tar_bytes(sample_members("1")))
    names = [unit.name for unit in WebDatasetSettings(paths=str(tmp_path)).open().units()]
    assert names[0] == "00003" and len(set(names)) == 3 and all(name.startswith("00007-") for name in names[1:])
    one = WebDatasetSettings(paths=(str(tmp_path / "a/*.tar"), str(tmp_path / "a/00007.tar"))).open()
    assert [unit.name for unit in one.units()] == ["00003", "00007"]
    assert told(answers(tmp_path / "a", prefix_keys=True)) == [("00003-1", ""), ("00007-1", "")]


def test_only_complete_tars_when_their_statistics_are_asked_for(tmp_path: Path) -> None:
    for name in ("00000", "00001"):
        (tmp_path / f"{name}.tar").write_bytes(tar_bytes(sample_members(name)))
    with pytest.raises(UserError, match="no tar with its _stats.json"):
        WebDatasetSettings(paths=str(tmp_path), require_stats=True).open().units()
    (tmp_path / "00001_stats.json").write_text('{"count": 5, "successes": 1}')
    (unit,) = WebDatasetSettings(paths=str(tmp_path), require_stats=True).open().units()
    assert (unit.name, unit.count) == ("00001", 5)
    (unit,) = WebDatasetSettings(paths=str(tmp_path), require_stats=True, count_failures=False).open().units()
    assert unit.count == 1


def test_pictures_that_were_not_downloaded_are_drops_with_their_reason(tmp_path: Path) -> None:
    rows = [
        {"key": "1", "url": "http://a/1", "caption": "one", "status": "success", "error_message": None},
        {
            "key": "2",
            "url": "http://a/2",
            "caption": "two",
            "status": "failed_to_download",
            "error_message": "timed out",
        },
        {
            "key": "3",
            "url": None,
            "caption": None,
            "status": "failed_to_resize",
            "error_message": "Image decoding error",
        },
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "00000.parquet")
    content = tar_bytes(sample_members("1"))
    failures = read(tmp_path, content)[1:]
    assert failures == [
        Drop("2", "download_too_slow", "timed out", "http://a/2", alt_text="two"),
        Drop("3", "download_undecodable", "Image decoding error"),
    ]
    assert len(read(tmp_path, content, count_failures=False)) == 1
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 not really")
    assert told(read(tmp_path, content)) == [("1", ""), ("00000", "bad_metadata")]


def test_samples_without_a_picture_or_with_bad_metadata_are_dropped(tmp_path: Path) -> None:
    members = [
        ("1.txt", b"no picture"),
        ("2.jpg", b"x"),
        ("2.json", b"{"),
        *sample_members("3", status="failed_to_download", error_message="HTTP Error 410: Gone"),
        ("4.jpg", bytes(2000)),
        ("5.jpg", b"x"),
        ("5.jpg", b"y"),
        *sample_members("6"),
        ("1.jpg", b"again"),
    ]
    assert told(read(tmp_path, tar_bytes(members), max_image_mb=0.001)) == [
        ("1", "no_image"),
        ("2", "bad_metadata"),
        ("3", "download_failed"),
        ("4", "too_large"),
        ("5", "repeated_key"),
        ("6", ""),
        ("1", "repeated_key"),
    ]


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        link("x.jpg", "/etc/passwd", tarfile.SYMTYPE),
        link("x.jpg", "1.jpg", tarfile.LNKTYPE),
        link("x.jpg", "", tarfile.FIFOTYPE),
        link("x.jpg", "", tarfile.CHRTYPE),
        ("/etc/x.jpg", b"x"),
        ("../../x.jpg", b"x"),
        ("a/../../x.jpg", b"x"),
        ("..\\x.jpg", b"x"),
    ],
)
def test_links_devices_and_names_that_lead_out_are_dropped(tmp_path: Path, member: Member | tarfile.TarInfo) -> None:
    first, second = sample_members("1"), sample_members("2")
    found = told(read(tmp_path, tar_bytes([*first, member, *second])))
    assert [reason for _, reason in found] == ["", "unsafe_member", ""]


def test_of_a_tar_that_was_cut_off_the_whole_samples_are_kept(tmp_path: Path) -> None:
    content = tar_bytes([member for number in range(5) for member in sample_members(str(number))])
    blocks = 6 * 512  # of a sample: three headers, three contents
    for length in (2 * blocks + 512, 2 * blocks + 700, 3 * blocks - 1, 3 * blocks):  # in a header, in a body, at an end
        found = read(tmp_path, content[:length])
        assert told(found) == [("0", ""), ("1", ""), ("00000", "broken_tar")]
    assert told(read(tmp_path, content[:100])) == told(read(tmp_path, b"")) == [("00000", "broken_tar")]


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    content = bytearray(tar_bytes([member for number in range(3) for member in sample_members(str(number))]))
    content[6 * 512 : 6 * 512 + 100] = b"\xff" * 100
    assert told(read(tmp_path, bytes(content))) == [("00000", "broken_tar")]


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """One header block whose size no tool would write."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT)[:512])
    block[124:136] = struct.pack(">Bxxx", 0x80 if size >= 0 else 0xFF) + struct.pack(">q", size)
    if size < 0:
        block[125:128] = b"\xff" * 3
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "block",
    [
        header("x.jpg", 1 << 50),  # claims a petabyte
        header("x.jpg", -512),  # would be read for ever
        header("x.cls", -512),
        header("x", 1 << 30, tarfile.XHDTYPE),  # a gigabyte of attributes
        header("x", 1 << 30, tarfile.GNUTYPE_LONGNAME),
        header("x", -512, tarfile.XHDTYPE),
        header("x", 512, tarfile.GNUTYPE_LONGNAME) * 3000,  # a name for a name for a name …
    ],
)
def test_headers_that_lie_about_sizes_neither_hang_nor_fill_memory(tmp_path: Path, block: bytes) -> None:
    first = tar_bytes([*sample_members("0"), *sample_members("1")])[: 12 * 512]
    found = read(tmp_path, first + block + tar_bytes(sample_members("2")))
    assert told(found) == [("0", ""), *told(found)[1:-1], ("00000", "broken_tar")]
    assert [reason for _, reason in told(found)[1:-1]] in ([], [""], ["", "too_large"])


class WatchedFile(io.BytesIO):
    """Notes how much is read in one piece; as if the file went on for ever."""

    longest = 0

    def read(self, count: int | None = -1, /) -> bytes:
        assert count is not None and count >= 0, "all of the file in one piece"
        self.longest = max(self.longest, count)
        return super().read(count)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.REGTYPE])
@pytest.mark.parametrize("size", [1 << 33, -512])
def test_no_header_makes_the_reader_take_more_than_it_may(kind: bytes, size: int) -> None:
    file = WatchedFile(tar_bytes(sample_members("1"))[: 6 * 512] + header("2.jpg", size, kind) + bytes(5 * 512))
    with pytest.raises(BrokenTar):
        list(read_groups(file, {"jpg": 1 << 22, "txt": 1 << 20, "json": 1 << 20}))
    assert file.longest <= 1 << 20


def test_names_in_other_letters_give_keys_that_differ(tmp_path: Path) -> None:
    members = [("ü.jpg", b"1"), ("ö.jpg", b"2"), ("a b.jpg", b"3"), ("a_b.jpg", b"4")]
    found = told(read(tmp_path, tar_bytes(members, tarfile.PAX_FORMAT)))
    assert len({key for key, _ in found}) == 4 and found[3] == ("a_b", "")


def test_object_stores_are_read_like_folders() -> None:
    fsspec.filesystem("memory").pipe({"/shards/00000.tar": tar_bytes(sample_members("1"))})
    assert told(answers("memory://shards")) == told(answers("memory://shards/*.tar")) == [("1", "")]


def test_no_tars_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "*.tar", tmp_path / "none.tar"):
        with pytest.raises(UserError, match=r"no .tar file there; give a folder, a file or a glob such as data/\*.tar"):
            WebDatasetSettings(paths=str(path)).open().units()
