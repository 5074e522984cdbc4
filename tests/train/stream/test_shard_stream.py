"""The stream over real shards: epochs, resuming, other layouts, mixtures, validation."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from data_pipeline.errors import UserError
from tests.train.stream.stream_shards import data_of, keys, sample_of, stream_of, write_shards
from train.stream import Layout, SamplePlace, Stream, StreamSample, ToyboxNumber, open_stream

SIZES = [34, 5, 66, 12]  # the rows 31 and 63 are for validation: 114 samples to train on, 3 held


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), SIZES)


def all_keys(split: str) -> list[str]:
    rows = [(shard, row) for shard, size in enumerate(SIZES) for row in range(size)]
    return [f"s{shard:05d}_{row:06d}" for shard, row in rows if (row % 32 == 31) == (split == "val")]


def key_at(stream: Stream, number: int) -> str:
    """The key of the sample that a number stands for, without reading it."""
    place = next(stream.places(number))
    assert isinstance(place, SamplePlace)
    return f"s{place.shard}_{place.row:06d}"


def epoch_reads(stream: Stream, slots_read: int) -> dict[int, Counter[str]]:
    """Keys that each slot is to read from its first position on, by epoch."""
    found: dict[int, Counter[str]] = {}
    source = stream.sources["pictures"]
    for slot in range(stream.layout.slots):
        for position in range(slots_read):
            number = stream.layout.number(slot, position) + stream.begun_at * stream.layout.samples_a_pass
            epoch = source.order.epoch(slot, position)
            found.setdefault(epoch, Counter())[key_at(stream, number)] += 1
    return found


@pytest.mark.parametrize("layout", [Layout(1, 0, 4), Layout(2, 2, 3), Layout(3, 0, 1), Layout(1, 5, 8)])
def test_each_sample_is_seen_once_an_epoch(layout: Layout, folder: str, tmp_path: Path) -> None:
    stream = stream_of(folder, tmp_path, layout)
    assert stream.samples_an_epoch == {"pictures": 114}
    found = epoch_reads(stream, 300 // layout.slots + 70)
    assert sorted(found[0].elements()) == sorted(found[1].elements()) == sorted(all_keys("train"))


def test_a_sample_comes_whole_with_its_names_and_a_seed_of_its_epoch(folder: str, tmp_path: Path) -> None:
    stream = stream_of(folder, tmp_path, Layout())
    first = sample_of(stream, 0)
    assert (first.source, f"s{first.shard}_{first.row:06d}") == ("pictures", first.key)
    assert keys(stream, range(60)) == [key_at(stream, number) for number in range(60)]
    assert first.sample.record.key == first.key and first.sample.jpeg.startswith(b"\xff\xd8")
    again = next(n for n in range(114, 228) if key_at(stream, n) == first.key)
    assert sample_of(stream, again).seed != first.seed
    other = stream_of(folder, tmp_path, Layout(2, 1, 4))
    same = next(n for n in range(300) if key_at(other, n) == first.key)
    assert sample_of(other, same).seed == first.seed, "in one epoch a sample is cropped alike under every layout"


def test_validation_samples_are_never_trained_on(folder: str, tmp_path: Path) -> None:
    held = stream_of(folder, tmp_path, Layout(), "val")
    assert sorted(keys(held, range(3))) == all_keys("val") and held.samples_an_epoch == {"pictures": 3}
    with pytest.raises(UserError, match=r"data.shards.pictures: no finished shard has 32 samples"):
        stream_of(write_shards(tmp_path / "small", [8, 20]), tmp_path, Layout(), "val")


@pytest.mark.parametrize("done", [0, 1, 2, 3, 5, 8, 29, 60])
def test_a_resumed_run_reads_what_the_undisturbed_one_would_have(done: int, folder: str, tmp_path: Path) -> None:
    layout = Layout(1, 2, 4)
    first = stream_of(folder, tmp_path, layout)
    kept = json.loads(json.dumps(first.position(done)))
    second = stream_of(folder, tmp_path, layout)
    second.resume(kept, done)
    numbers = range(done * 4, done * 4 + 40)
    assert keys(second, numbers) == keys(first, numbers)
    assert second.position(done + 3) == first.position(done + 3)


def test_another_accumulation_counts_passes_anew_and_goes_on(folder: str, tmp_path: Path) -> None:
    layout = Layout(2, 0, 4)
    first, second = stream_of(folder, tmp_path, layout), stream_of(folder, tmp_path, layout)
    second.resume(first.position(10), 5)
    assert keys(second, range(40, 80)) == keys(first, range(80, 120))


@pytest.mark.parametrize(("old", "done", "new"), [
    (Layout(2, 2, 4), 9, Layout(1, 0, 8)), (Layout(1, 1, 8), 12, Layout(4, 2, 2)),
    (Layout(3, 0, 5), 25, Layout(2, 0, 5)),
])  # fmt: skip
def test_another_layout_loses_nothing(old: Layout, done: int, new: Layout, folder: str, tmp_path: Path) -> None:
    first = stream_of(folder, tmp_path, old, shuffle_shards=1)
    numbers = range(done * old.samples_a_pass)
    read: dict[int, set[str]] = {}
    for number in numbers:
        epoch = first.sources["pictures"].order.epoch(*old.place(number))
        read.setdefault(epoch, set()).add(key_at(first, number))
    second = stream_of(folder, tmp_path, new, shuffle_shards=1)
    second.resume(json.loads(json.dumps(first.position(done))), 7)
    for epoch, found in epoch_reads(second, 300 // new.slots + 70).items():
        read.setdefault(epoch, set()).update(found)
    epoch = second.sources["pictures"].order.begun.epoch
    assert all(read[e] == set(all_keys("train")) for e in range(epoch + 2))
    assert second.epoch_of(7) == first.epoch_of(done) == {"pictures": len(numbers) / 114}
    third = stream_of(folder, tmp_path, new, shuffle_shards=1)
    third.resume(second.position(10), 10)
    assert keys(third, range(10 * new.samples_a_pass, 13 * new.samples_a_pass)) == keys(
        second, range(10 * new.samples_a_pass, 13 * new.samples_a_pass)
    )
    with pytest.raises(IndexError, match="lies before the pass where this run goes on, 7"):
        second[0]


def test_changed_shards_begin_a_new_epoch_and_say_so(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = stream_of(folder, tmp_path, Layout(1, 0, 8))
    kept = first.position(20)  # in the second epoch
    more = write_shards(tmp_path / "more", [*SIZES, 40])
    second = stream_of(more, tmp_path, Layout(1, 0, 8))
    assert second.contents != first.contents
    second.resume(kept, 20)
    assert capsys.readouterr().out == "data.shards.pictures: the shards changed; a new epoch begins\n"
    assert second.sources["pictures"].order.begun.epoch == 2
    assert len({key_at(second, number) for number in range(160, 160 + 153)}) == 153


def test_changed_weights_hold_from_there_on(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def mixed(toybox: float) -> Stream:
        sources = {"toybox": {"weight": toybox}, "shards": {"pictures": {"folder": folder}}}
        return open_stream(data_of(tmp_path, shuffle_shards=1, **sources), "train", Layout(1, 0, 8))

    first, second = mixed(1.0), mixed(3.0)
    second.resume(first.position(10), 10)
    assert capsys.readouterr().out == (
        "data: weights changed from toybox=1, pictures=1 to toybox=3, pictures=1; they hold from here on\n"
    )
    before, after = ([stream[n] for n in range(start, start + 80)] for stream, start in ((first, 0), (second, 80)))
    assert sum(isinstance(item, ToyboxNumber) for item in before) == 40
    assert sum(isinstance(item, ToyboxNumber) for item in after) == 60
    scenes = [item.number for item in (*before, *after) if isinstance(item, ToyboxNumber)]
    assert len(set(scenes)) == len(scenes) == 100, "no scene twice"


def test_toybox_scenes_go_on_whatever_the_layout(tmp_path: Path) -> None:
    first = open_stream(data_of(tmp_path), "train", Layout(1, 0, 8))
    assert [first[n] for n in range(3)] == [ToyboxNumber(0), ToyboxNumber(1), ToyboxNumber(2)]
    assert first[5].key == "toybox/5" and first.samples_an_epoch == {} and first.epoch_of(9) == {}
    second = open_stream(data_of(tmp_path), "train", Layout(2, 3, 4))
    second.resume(first.position(10), 10)
    assert [second[n] for n in range(80, 120)] == [first[n] for n in range(80, 120)]
    third = open_stream(data_of(tmp_path), "train", Layout(1, 0, 2))
    third.resume(second.position(15), 15)
    assert third[30] == ToyboxNumber(120)


def test_what_is_no_position_is_refused(folder: str, tmp_path: Path) -> None:
    stream = stream_of(folder, tmp_path, Layout())
    good = stream.position(4)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "Field required"),
        ({**good, "passes": -1}, "passes: Input should be greater than or equal to 0"),
        ({**good, "begun_at": 9}, "passes=4 lies before begun_at=9"),
        ({**good, "pool": 3}, "pool: Extra inputs are not permitted"),
        ({**good, "split": "val"}, "position is that of split 'val'"),
    ]
    for position, told in wrong:
        with pytest.raises(UserError, match=told):
            stream.resume(position, 4)


@pytest.mark.parametrize("start", [0, 3])
def test_a_loader_with_two_workers_yields_what_the_arithmetic_says(start: int, folder: str, tmp_path: Path) -> None:
    layout = Layout(1, 2, 4)
    stream = stream_of(folder, tmp_path, layout)
    assert stream[0].key  # a shard is open here before the workers are forked
    batches = [list(range(p * 4, p * 4 + 4)) for p in range(start, start + 40)]
    loader = DataLoader(stream, batch_sampler=batches, num_workers=2, collate_fn=list)  # type: ignore[arg-type]
    found = [[item.key for item in batch] for batch in loader]
    assert found == [keys(stream, batch) for batch in batches]


def test_a_stream_can_be_sent_to_another_process(folder: str, tmp_path: Path) -> None:
    stream = stream_of(folder, tmp_path, Layout(1, 2, 4))
    expected = keys(stream, range(30))
    assert keys(pickle.loads(pickle.dumps(stream)), range(30)) == expected


def test_shards_are_gone_through_in_order_for_the_cache(folder: str, tmp_path: Path) -> None:
    stream = stream_of(folder, tmp_path, Layout())
    shards = stream.shards
    assert [(shard.source, shard.name) for shard in shards] == [("pictures", f"{n:05d}") for n in range(4)]
    pairs = zip(shards, [*shards[1:], None], strict=True)
    in_order = [sample for shard, following in pairs for sample in stream.samples_in_order(shard, following)]
    assert [sample.key for sample in in_order] == sorted(all_keys("train") + all_keys("val"))
    by_key = {sample.key: sample for sample in in_order}
    assert by_key[stream[0].key].seed == sample_of(stream, 0).seed, "the cached view is that of the first epoch"
    place = next(stream.places(0))
    assert isinstance(place, SamplePlace) and by_key[stream[0].key].row == place.row


def test_another_sample_of_the_shard_is_never_itself_nor_one_that_is_held(folder: str, tmp_path: Path) -> None:
    stream = stream_of(folder, tmp_path, Layout())
    sample = next(item for n in range(114) if (item := sample_of(stream, n)).shard == "00000")
    others = {stream.another(sample, number).key for number in range(200)}
    assert others == {key for key in all_keys("train") if key.startswith("s00000")} - {sample.key}


@pytest.mark.parametrize(("source", "told"), [
    ({}, "neither of folder and pipe given"),
    ({"folder": "a", "pipe": "cat {file}"}, "both of folder and pipe given"),
    ({"folder": "a", "names": "0"}, "names=0: only with pipe"),
    ({"pipe": "cat it", "names": "0"}, "expected {file} where the name"),
    ({"pipe": "cat {file}"}, "names: missing"),
    ({"pipe": "cat {file}", "names": "{00..03"}, "Unbalanced braces"),
    ({"pipe": "cat {file}", "names": "a;rm"}, "gives 'a;rm'"),
    ({"pipe": "cat {file}", "names": "{a,a}"}, "names a shard twice"),
    ({"folder": "/nowhere/at/all"}, "no finished shards"),
])  # fmt: skip
def test_mistakes_in_a_source_are_one_line(source: dict[str, str], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.shards\.mine") as caught:
        open_stream(data_of(tmp_path, shards={"mine": source}), "train", Layout())
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_more_readers_than_samples_are_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "few", [3])
    assert len(set(keys(stream_of(folder, tmp_path, Layout(3, 0, 1)), range(3)))) == 3
    with pytest.raises(UserError, match="3 samples for 4 loading processes; lower data.workers"):
        stream_of(folder, tmp_path, Layout(2, 2, 1))


def test_a_source_of_weight_0_is_not_looked_at(folder: str, tmp_path: Path) -> None:
    shards = {"pictures": {"folder": folder}, "away": {"folder": "s3://nowhere/at/all", "weight": 0}}
    stream = open_stream(data_of(tmp_path, shards=shards), "train", Layout())
    assert all(isinstance(stream[n], StreamSample) for n in range(5)) and list(stream.samples_an_epoch) == ["pictures"]
