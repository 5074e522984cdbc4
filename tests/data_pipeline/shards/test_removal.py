"""Take-downs by url and sha256."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_pipeline.command import main
from data_pipeline.errors import UserError
from data_pipeline.shards.reader import list_shards, read_drops, read_shard
from data_pipeline.shards.removal import read_list, remove_samples
from data_pipeline.shards.verify import verify
from data_pipeline.shards.writer import write_shard
from tests.data_pipeline.shards.small_shards import sample


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards of three samples."""
    shards = tmp_path / "shards"
    for number in range(2):
        samples = [sample(10 * number + i) for i in range(3)]
        write_shard(shards, f"0000{number}", samples, {"settings": "a"})
    return shards


def keys(folder: Path) -> list[str]:
    return [sample.record.key for shard in list_shards(folder) for sample in read_shard(shard.tar)]


def test_what_is_listed_leaves_and_nothing_else_changes(folder: Path) -> None:
    other = (folder / "00001.tar").read_bytes()
    gone = next(read_shard(folder / "00000.tar")).record
    assert remove_samples(folder, {gone.sha256, "https://elsewhere.example/x.jpg"}) == {"00000": 1}
    assert gone.key not in keys(folder) and len(keys(folder)) == 5
    assert (folder / "00001.tar").read_bytes() == other
    (drop,) = read_drops(folder, "00000")
    assert (drop.reason, drop.sha256, drop.alt_text) == ("taken_down", gone.sha256, "")
    assert verify(folder).ok
    assert remove_samples(folder, {gone.sha256}) == {}, "a replayed list changes nothing"


def test_a_copy_of_the_folder_ends_the_same(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    listed = {sample.record.sha256 for sample in read_shard(folder / "00001.tar")}
    for place in (folder, copy):
        remove_samples(place, listed)
    for name in ("00001.tar", "00001.parquet", "00001_stats.json"):
        assert (folder / name).read_bytes() == (copy / name).read_bytes()


def test_a_list_that_is_none_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("# by mail\nnot a hash\n")
    with pytest.raises(UserError, match="'not a hash': expected a url or a sha256"):
        read_list(listed)
    listed.write_text("# nothing\n")
    with pytest.raises(UserError, match="names nothing"):
        read_list(listed)
    listed.write_text(f"{next(read_shard(folder / '00000.tar')).record.sha256}\n")
    assert main(["remove", str(folder), "--list", str(listed)]) == 0
    assert "1 samples removed from 1 shards" in capsys.readouterr().out
