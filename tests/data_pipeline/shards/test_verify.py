"""Verification: a sound folder passes, one damaged byte anywhere is found, and each line says what to do."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.record import Sample
from data_pipeline.shards import verify as module
from data_pipeline.shards.reader import list_shards, read_stats
from data_pipeline.shards.shard_stats import FileFacts, stats_to_json
from data_pipeline.shards.verify import verify
from data_pipeline.shards.writer import write_shard
from tests.data_pipeline.shards.small_shards import FACTS, items, sample, small_folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_folder(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "copy"))


def problem(folder: Path) -> str:
    report = verify(folder)
    assert not report.ok and len(report.problems) == 1
    assert any(line == f"damaged: {report.problems[0]}" for line in report.lines())
    return report.problems[0]


def test_a_sound_folder_passes(sound: Path) -> None:
    report = verify(sound)
    assert report.ok and (report.shards, report.kept, report.dropped, report.entities) == (2, 12, 6, 16)
    assert report.lines() == [
        f"{sound}: 2 shards, 12 samples, 16 entities, 6 dropped",
        "all finished shards are sound",
    ]


def test_several_processes_find_the_same(folder: Path) -> None:
    (folder / "00001.tar").unlink()
    assert verify(folder, processes=2) == verify(folder)


def test_an_empty_folder_is_not_sound(tmp_path: Path) -> None:
    assert not verify(tmp_path).ok and "no finished shard here" in verify(tmp_path).lines()[1]


@pytest.mark.parametrize("name", ["00001.tar", "00001.parquet", "00001_stats.json"])
def test_one_changed_byte_anywhere_is_found(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    rng = random.Random(name)
    for place in rng.sample(range(len(whole)), 30):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert name in problem(folder)
    path.write_bytes(whole + b"\n")
    assert name in problem(folder)
    path.write_bytes(whole[:-1])
    assert name in problem(folder)


def test_a_missing_file_is_found(folder: Path) -> None:
    (folder / "00000.parquet").unlink()
    assert "00000.parquet: cannot be read" in problem(folder)


def _as_if_written_so(folder: Path, name: str) -> None:
    """Make the stats agree with the files' bytes, so that only the contents can tell."""
    shard = next(shard for shard in list_shards(folder) if shard.name == name)
    stats = read_stats(shard)
    facts = {file: module._file_facts(str(folder / file)) for file in stats.files}
    assert all(isinstance(fact, FileFacts) for fact in facts.values())
    Path(shard.stats).write_text(stats_to_json(replace(stats, files=facts)))


@pytest.mark.parametrize("name", ["00000.tar", "00000.parquet"])
def test_tar_and_table_of_different_samples_are_found(folder: Path, tmp_path: Path, name: str) -> None:
    write_shard(tmp_path / "other", "00000", items(5, prefix="s0_"), FACTS)
    shutil.copy(tmp_path / "other" / name, folder / name)
    _as_if_written_so(folder, "00000")
    assert "s0_000005" in problem(folder)


def test_a_caption_that_differs_between_tar_and_table_is_found(folder: Path, tmp_path: Path) -> None:
    given = items(prefix="s0_")
    changed = [
        replace(item, record=replace(item.record, alt_text="other"))
        if isinstance(item, Sample) and item.record.key == "s0_000003"
        else item
        for item in given
    ]
    write_shard(tmp_path / "other", "00000", changed, FACTS)
    shutil.copy(tmp_path / "other" / "00000.parquet", folder / "00000.parquet")
    _as_if_written_so(folder, "00000")
    assert "alt_text: 'other', the record s0_000003 says" in problem(folder)


def test_a_picture_that_does_not_decode_is_found(tmp_path: Path) -> None:
    whole = sample(0)
    write_shard(tmp_path, "00000", [replace(whole, jpeg=whole.jpeg[:400])], FACTS)
    assert "00000.tar: k000000.jpg: cannot be decoded as JPEG" in problem(tmp_path)


def test_counts_that_the_files_do_not_have_are_found(folder: Path) -> None:
    shard = list_shards(folder)[0]
    stats = read_stats(shard)
    Path(shard.stats).write_text(stats_to_json(replace(stats, nouns={"dog": 8})))
    assert "nouns: {'dog': 8}" in problem(folder)


def test_a_key_in_two_shards_is_found(folder: Path) -> None:
    write_shard(folder, "00002", [sample(0, prefix="s1_")], FACTS)
    assert problem(folder).startswith("key s1_000000 stands in 00001, 00002; ")


def test_shards_of_two_builds_are_found(folder: Path) -> None:
    write_shard(folder, "00002", [sample(0)], {**FACTS, "config_hash": "dead"})
    assert 'config_hash is "c0ffee" in 00000, "dead" in 00002' in problem(folder)


def test_unfinished_shards_and_leftovers_are_listed_but_no_fault(folder: Path) -> None:
    (folder / "00001_stats.json").unlink()
    (folder / ".00002.tar.elsewhere.1.0.tmp").write_bytes(b"")
    os.utime(folder / ".00002.tar.elsewhere.1.0.tmp", (0, 0))
    report = verify(folder)
    assert report.ok and report.unfinished == ("00001.parquet", "00001.tar")
    assert len(report.leftovers) == 1 and report.leftovers[0].endswith(".00002.tar.elsewhere.1.0.tmp")
    assert any("run again, finishes it" in line for line in report.lines())
