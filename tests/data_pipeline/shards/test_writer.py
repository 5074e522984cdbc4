"""The writer: equal samples are equal bytes, a shard is there whole or not at all."""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import signal
import tarfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import webdataset

from data_pipeline.errors import UserError
from data_pipeline.record import Drop, Sample
from data_pipeline.shards.reader import list_shards, read_drops, read_shard, read_stats
from data_pipeline.shards.storage import clean_leftovers
from data_pipeline.shards.verify import verify
from data_pipeline.shards.writer import SampleRefused, ShardWriter, write_shard
from tests.data_pipeline.shards.small_shards import FACTS, HEIGHT, WIDTH, items, sample

FILES = ["00000.parquet", "00000.tar", "00000_stats.json"]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_what_was_written_is_read_back_in_order(tmp_path: Path) -> None:
    given = items()
    write_shard(tmp_path, "00000", given, FACTS)
    assert names(tmp_path) == FILES
    assert list(read_shard(tmp_path / "00000.tar")) == [item for item in given if isinstance(item, Sample)]
    assert list(read_drops(tmp_path, "00000")) == [item for item in given if isinstance(item, Drop)]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_shard(tmp_path / folder, "00000", items(), FACTS)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_members_are_plain_files_without_time_or_owner(tmp_path: Path) -> None:
    write_shard(tmp_path, "00000", items(1), FACTS)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [f"k000000.{end}" for end in ("jpg", "txt", "json", "ref0.png")]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {
        (0, 0, 0, "", "", 0o444, tarfile.REGTYPE)
    }


@pytest.mark.filterwarnings("ignore")
def test_webdataset_itself_reads_a_shard(tmp_path: Path) -> None:
    write_shard(tmp_path, "00000", items(), FACTS)
    dataset = webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False).decode("rgb8")
    found = list(dataset)
    assert [part["__key__"] for part in found] == [f"k{number:06d}" for number in range(6)]
    assert found[0]["jpg"].shape == (HEIGHT, WIDTH, 3)
    assert found[0]["json"]["entities"][0]["noun"] == "dog"
    assert found[0]["txt"] == found[0]["json"]["caption"]
    assert found[0]["ref0.png"].shape[:2] == (6, 8)


def test_stats_count_what_was_kept_and_dropped(tmp_path: Path) -> None:
    written = write_shard(tmp_path, "00000", items(), FACTS)
    stats = read_stats(list_shards(tmp_path)[0])
    assert stats == written
    assert (stats.read, stats.kept, stats.dropped, stats.entities) == (9, 6, {"image_corrupt": 3}, 8)
    assert stats.nouns == {"dog": 4, "ball": 4} and stats.facts == FACTS
    assert stats.files["00000.tar"].bytes == (tmp_path / "00000.tar").stat().st_size


def test_the_table_has_a_row_for_each_sample_and_each_drop(tmp_path: Path) -> None:
    write_shard(tmp_path, "00000", items(2), FACTS)
    rows = pq.read_table(tmp_path / "00000.parquet").to_pylist()
    assert [(row["key"], row["status"], row["reason"], row["num_entities"]) for row in rows] == [
        ("k000000", "kept", "", 2),
        ("k000001", "kept", "", 2),
        ("kbad1", "dropped", "image_corrupt", None),
    ]


def test_drops_alone_and_nothing_at_all_make_a_shard(tmp_path: Path) -> None:
    write_shard(tmp_path, "a", [Drop("x", "image_empty")], FACTS)
    write_shard(tmp_path, "b", [], FACTS)
    assert [read_stats(shard).read for shard in list_shards(tmp_path)] == [1, 0]
    assert list(read_shard(tmp_path / "a.tar")) == list(read_shard(tmp_path / "b.tar")) == []


def test_text_that_utf8_cannot_hold_is_written_with_question_marks(tmp_path: Path) -> None:
    whole = sample(2)
    broken = Sample(replace(whole.record, caption="a \ud800", alt_text="\udfff"), whole.jpeg)
    write_shard(tmp_path, "00000", [broken, Drop("x", "bad", detail="\ud800", alt_text="\ud800")], FACTS)
    assert next(read_shard(tmp_path / "00000.tar")).record.caption == "a ?"
    assert next(read_drops(tmp_path, "00000")).detail == "?"


def test_an_error_in_the_source_leaves_nothing(tmp_path: Path) -> None:
    def source() -> Iterator[Sample]:
        yield sample(0)
        raise RuntimeError("the network is gone")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path, "00000", source(), FACTS)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: replace(s, record=replace(s.record, width=47)), "not inside|mask.size"),
        (lambda s: replace(s, references={}), "k000000.ref0.png"),
        (lambda s: replace(s, jpeg=b"GIF89a"), "no JPEG"),
        (lambda s: replace(s, record=replace(s.record, key="a/b")), "key="),
    ],
)
def test_what_the_reader_would_refuse_is_not_written(tmp_path: Path, change, told: str) -> None:
    with pytest.raises(UserError, match=told):
        write_shard(tmp_path, "00000", [change(sample(0))], FACTS)
    assert names(tmp_path) == []


def test_a_drop_may_take_the_place_of_a_refused_sample(tmp_path: Path) -> None:
    bad = replace(sample(0), jpeg=b"")
    with ShardWriter(tmp_path, "00000", FACTS) as writer:
        with pytest.raises(SampleRefused):
            writer.add(bad)
        writer.add(Drop(bad.record.key, "refused"))
        writer.add(sample(1))
    assert [found.record.key for found in read_shard(tmp_path / "00000.tar")] == ["k000001"]
    assert verify(tmp_path).ok


def test_a_key_is_written_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="second sample with this key"):
        write_shard(tmp_path, "00000", [sample(0), Drop("k000000", "bad")], FACTS)


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "x" * 101])
def test_a_shard_name_is_a_plain_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="shard name"):
        ShardWriter(tmp_path, name, FACTS)


def test_a_shard_written_anew_is_unfinished_until_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path, "00000", items(), FACTS)
    seen: list[list[str]] = []
    rename = os.replace

    def watched(source: Path, target: Path) -> None:
        seen.append([name for name in names(tmp_path) if not name.startswith(".")])
        rename(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_shard(tmp_path, "00000", items(3), FACTS)
    assert seen == [FILES[:2]] * 3
    assert names(tmp_path) == FILES


def test_a_failing_rename_leaves_nothing_of_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.replace

    def failing(source: Path, target: Path) -> None:
        if str(target).endswith("_stats.json"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UserError, match="cannot be written .Input/output error."):
        write_shard(tmp_path, "00000", items(), FACTS)
    assert names(tmp_path) == []


def test_a_full_disk_is_one_line_and_finished_shards_stay(tmp_path: Path) -> None:
    write_shard(tmp_path, "00000", items(), FACTS)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    heard = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the system's own refusal to write on
    try:
        with pytest.raises(UserError) as caught:
            write_shard(tmp_path, "00001", items(40, prefix="m"), FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, heard)
    assert re.fullmatch(r"\S*00001: cannot be written \(File too large\); .*stays valid.*", str(caught.value))
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ShardWriter(tmp_path / "file" / "folder", "00000", FACTS)


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    def source() -> Iterator[Sample]:
        for number in range(150):
            whole = sample(2)
            yield Sample(replace(whole.record, key=f"n{number}"), whole.jpeg + bytes(200_000))

    tracemalloc.start()
    write_shard(tmp_path, "00000", source(), FACTS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "00000.tar").stat().st_size > 30_000_000
    assert peak < 8_000_000


def _die_while_writing(folder: Path) -> None:
    writer = ShardWriter(folder, "00001", FACTS)
    for item in items():
        writer.add(item)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_run_left_is_cleaned_and_what_a_running_one_writes_is_not(tmp_path: Path) -> None:
    write_shard(tmp_path, "00000", items(), FACTS)
    killed = multiprocessing.get_context("fork").Process(target=_die_while_writing, args=(tmp_path,))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert [shard.name for shard in list_shards(tmp_path)] == ["00000"]
    left = {name for name in names(tmp_path) if name.endswith(".tmp")}
    assert len(left) == 2
    with ShardWriter(tmp_path, "00002", FACTS) as running:
        assert {path.name for path in clean_leftovers(tmp_path)} == left
        running.add(sample(0))
    assert [shard.name for shard in list_shards(tmp_path)] == ["00000", "00002"]
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
