"""Damaged samples and shards: skipped, counted, told; too many stop the run."""

from __future__ import annotations

from pathlib import Path
from traceback import clear_frames

import pytest
from torch.utils.data import DataLoader

from data_pipeline.errors import UserError
from data_pipeline.shards.reader import list_shards
from data_pipeline.shards.shard_index import ShardIndex
from tests.train.stream.stream_shards import keys, stream_of, write_shards
from train.stream import Layout, StreamSample, ToyboxNumber, plain_error


def spoil(folder: str, item: int) -> str:
    """Overwrite the record of a sample (by its number in the folder) with text of the same length; returns its key."""
    index = ShardIndex(list_shards(folder))
    shard, row = index.place(item)
    start, end = index.extents(shard)[row]
    tar = Path(index.shards[shard].tar)
    data = bytearray(tar.read_bytes())
    place = data.index(b'"schema_version"', int(start), int(end))
    data[place : place + 16] = b'"schemo_version"'
    tar.write_bytes(data)
    return f"s{index.shards[shard].name}_{row:06d}"


def test_a_damaged_sample_is_replaced_by_the_next_of_its_window(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, spoilt = write_shards(tmp_path / "whole", [20, 20]), write_shards(tmp_path / "spoilt", [20, 20])
    key = spoil(spoilt, 25)
    expected = keys(stream_of(whole, tmp_path, Layout()), range(80))
    stream = stream_of(spoilt, tmp_path, Layout())
    found = keys(stream, range(80))
    for start in (0, 40):
        place = expected.index(key, start)
        expected[place] = expected[start + (place - start + 1) % 40]
    assert found == expected
    assert stream.damage.samples == 1 and stream.damage.shards == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and f"00001.tar: {key}.json" in told[0] and told[0].startswith("skipped: ")


def test_a_sample_that_cannot_be_decoded_is_skipped_alike(tmp_path: Path) -> None:
    stream = stream_of(write_shards(tmp_path / "shards", [20, 20]), tmp_path, Layout())
    first, second = keys(stream, range(2))

    def decode(item: StreamSample | ToyboxNumber) -> str:
        if item.key == first:
            raise UserError(f"{item.key}.jpg: cannot be decoded")
        return item.key

    assert stream.decoded(0, decode) == second and stream.damage.samples == 1


def test_a_shard_that_is_no_tar_is_skipped_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "shards", [6, 6, 6])
    (tmp_path / "shards" / "00001.tar").write_bytes(b"x" * 5000)
    stream = stream_of(folder, tmp_path, Layout(), shuffle_shards=1)
    found = keys(stream, range(36))
    assert {key[:6] for key in found} == {"s00000", "s00002"}
    assert stream.damage.shards == 1 and stream.damage.samples == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "shard skipped: " in told[0] and "00001.tar: no tar header at byte 0" in told[0]


def test_too_many_damaged_shards_stop_the_run(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [4] * 3)
    for name in ("00000", "00001"):
        (tmp_path / "shards" / f"{name}.tar").write_bytes(b"x" * 5000)
    with pytest.raises(UserError, match=r"2 of the \d shards read are damaged, over 1%; the last: .*0000\d.tar"):
        keys(stream_of(folder, tmp_path, Layout()), range(12))


def test_too_many_damaged_samples_stop_the_run_with_one_line_from_a_worker(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [30])
    for item in range(0, 24, 2):
        spoil(folder, item)
    stream = stream_of(folder, tmp_path, Layout(1, 2, 2))
    batches = [[2 * p, 2 * p + 1] for p in range(40)]
    read = iter(DataLoader(stream, batch_sampler=batches, num_workers=2, collate_fn=list))  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        list(read)
    clear_frames(caught.tb)  # they hold on to the workers, who would be waited for at some later time
    del read
    line = str(plain_error(caught.value))
    assert line.startswith("11 of the ") and line.endswith("check the shards with `subject-diffusion data verify`")
    assert stream.damage.samples == 11, "the workers' counts are those of the process"
    assert str(plain_error(UserError("as it is"))) == "as it is"


def test_a_missing_tar_stops_the_run(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", [6])
    (tmp_path / "shards" / "00000.tar").unlink()
    with pytest.raises(UserError, match=r"00000.tar: cannot be read \(No such file or directory\)"):
        stream_of(folder, tmp_path, Layout())[0]
