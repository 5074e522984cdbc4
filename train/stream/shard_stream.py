"""The stream of training samples: sample n is a function of n, the settings and the layout, and is still encoded here.

Arithmetic leads from n to a source, a shard and a row; nothing has to be replayed to begin in the middle. Toybox
scenes are handed out by their number, and drawn by whoever asks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch.utils.data import Dataset

from data_pipeline.errors import UserError
from data_pipeline.record import Sample
from train.settings import DataSettings
from train.stream.damage import DamageCount
from train.stream.layout import Layout
from train.stream.mixture import TOYBOX, Mixture
from train.stream.position import Position, SourcePosition, read_position
from train.stream.shard_list import ShardEntry
from train.stream.shard_order import Begun
from train.stream.shard_places import Damaged
from train.stream.shard_source import ShardSource, Split, another_row

ResultType = TypeVar("ResultType")


@dataclass(frozen=True)
class ToyboxNumber:
    """A toybox scene: `number` is that of the world, unique in a run."""

    number: int

    @property
    def key(self) -> str:
        """What a person finds it by."""
        return f"toybox/{self.number}"


@dataclass(frozen=True)
class SamplePlace:
    """Where a sample lies."""

    source: str  # section of data.shards
    shard: str
    row: int  # in the shard
    seed: tuple[int, ...]  # of all that is drawn for it in this epoch


@dataclass(frozen=True)
class StreamSample:
    """A sample of a shard, still encoded."""

    source: str
    shard: str
    key: str
    sample: Sample
    seed: tuple[int, ...]
    row: int = 0


@dataclass(frozen=True)
class StreamShard:
    """A shard of a source."""

    source: str
    entry: ShardEntry

    @property
    def name(self) -> str:
        return self.entry.name


def open_stream(data: DataSettings, split: Split, layout: Layout) -> Stream:
    """The stream of the sources that have a weight; lists shards and reads their stats, opens none.

    Raises:
        UserError: keys missing or in contradiction, a source without shards.
    """
    return Stream(data, split, layout)


class Stream(Dataset[Any]):
    """See the module's text. Implements `train.stream.position.Resumable`."""

    def __init__(self, data: DataSettings, split: Split, layout: Layout) -> None:
        self.data, self.split, self.layout = data, split, layout
        toybox = data.toybox.weight
        self.weights = {TOYBOX: (0.0 if data.shards else 1.0) if toybox is None else toybox}
        self.weights |= {name: source.weight for name, source in data.shards.items()}
        if TOYBOX in data.shards:
            raise UserError("data.shards: a source without a name; give it one")
        self.mixture = Mixture(self.weights, data.seed)
        self.sources = {
            name: ShardSource(name, source, data, split) for name, source in data.shards.items() if source.weight
        }
        self.damage = DamageCount(layout.workers)
        self.begun_at = 0  # forward pass where the arithmetic has its origin
        self.first_scene = 0  # toybox scene of the sample number 0 from there
        for source in self.sources.values():
            source.begin(Begun(), 0.0, layout.slots)

    @property
    def contents(self) -> str:
        """A hash of all that the shards hold."""
        found = [[name, source.contents] for name, source in sorted(self.sources.items())]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]

    @property
    def samples_an_epoch(self) -> dict[str, int]:
        """By source of shards."""
        return {name: source.samples for name, source in self.sources.items()}

    @property
    def shards(self) -> list[StreamShard]:
        """Every shard that has samples of this split, by source and name."""
        return [StreamShard(name, entry) for name, source in self.sources.items() for entry in source.entries]

    def __getitem__(self, number: int) -> StreamSample | ToyboxNumber:
        return self.decoded(number, lambda item: item)

    def decoded(self, number: int, decode: Callable[[StreamSample | ToyboxNumber], ResultType]) -> ResultType:
        """`decode` of sample `number`; of the next one of its window where that is damaged.

        Args:
            decode: raises a UserError for a sample that cannot be decoded, which is counted and skipped like those
                that cannot be read.
        Raises:
            UserError: a shard cannot be read, or too much is damaged.
        """
        slot, position = self._place(number)
        name, index = self.mixture.place(slot, position)
        if name in self.sources:
            self.sources[name].ahead(slot, index)
        for place in self.places(number):
            if isinstance(place, ToyboxNumber):
                return decode(place)
            source = self.sources[place.source]
            whole = source.reader.is_damaged(source.numbers[place.shard])
            if whole is not None:
                continue
            sample: StreamSample | None = None
            try:
                sample = self.read(place)
                found = decode(sample)
            except UserError as error:
                if sample is None and not isinstance(error, Damaged):
                    raise
                self._count(source, place, error)
                continue
            self.damage.read(place.source, place.shard)
            return found
        raise UserError(f"data.shards.{name}: no sample can be read; check it with `subject-diffusion data verify`")

    def places(self, number: int) -> Iterator[SamplePlace | ToyboxNumber]:
        """Where sample `number` lies, then those that take its place where it is damaged. No shard is opened."""
        slot, position = self._place(number)
        name, index = self.mixture.place(slot, position)
        if name == TOYBOX:
            yield ToyboxNumber(number - self.begun_at * self.layout.samples_a_pass + self.first_scene)
            return
        source = self.sources[name]
        for entry, row, turn in source.rows(slot, index):
            yield SamplePlace(name, entry.name, row, source.seed(entry.name, row, turn))

    def read(self, place: SamplePlace) -> StreamSample:
        """The sample that lies there.

        Raises:
            Damaged: it, or its shard, is not as it should be.
            UserError: its shard cannot be read.
        """
        source = self.sources[place.source]
        sample = source.sample(source.entries[source.numbers[place.shard]], place.row)
        return StreamSample(place.source, place.shard, sample.record.key, sample, place.seed, place.row)

    def another(self, sample: StreamSample, number: int) -> StreamSample:
        """Another sample of the same shard, of training or validation as this one is; of one alone, itself.

        Args:
            number: chooses among them, drawn from any range.

        Raises:
            Damaged: it is not as it should be.
            UserError: its shard cannot be read.
        """
        source = self.sources[sample.source]
        row = another_row(source.entries[source.numbers[sample.shard]].samples, sample.row, number)
        return self.read(SamplePlace(sample.source, sample.shard, row, (*sample.seed, number)))

    def samples_in_order(self, shard: StreamShard, following: StreamShard | None = None) -> Iterator[StreamSample]:
        """All samples of a shard, those for validation too, each as in epoch 0; what is damaged is counted and skipped.

        Args:
            following: the shard that is asked for next, opened meanwhile.
        Raises:
            UserError: it cannot be read, or too much is damaged.
        """
        source = self.sources[shard.source]
        wanted = [shard] if following is None or following.source != shard.source else [shard, following]
        source.reader.want(0, [source.numbers[each.name] for each in wanted])
        for row in range(shard.entry.samples):
            place = SamplePlace(shard.source, shard.name, row, source.seed(shard.name, row, 0))
            try:
                sample = self.read(place)
            except Damaged as error:
                self._count(source, place, error)
                if source.reader.is_damaged(source.numbers[shard.name]) is not None:
                    return
                continue
            self.damage.read(shard.source, shard.name)
            yield sample

    def epoch_of(self, passes: int) -> dict[str, float]:
        """How often each source of shards was read, after so many forward passes."""
        taken = self._taken(self.layout, self.mixture, passes - self.begun_at)
        return {name: source.seen + sum(taken[name]) / source.samples for name, source in self.sources.items()}

    def position(self, passes: int) -> dict[str, Any]:
        """See `Resumable`."""
        data, layout = self.data, self.layout
        sources = {
            name: SourcePosition(
                contents=source.contents, samples=source.samples, weight=self.weights[name],
                epoch=source.order.begun.epoch,
                finished=dict(source.order.begun.finished), seen=source.seen,
            )
            for name, source in self.sources.items()
        }  # fmt: skip
        return Position(
            passes=passes, begun_at=self.begun_at, first_scene=self.first_scene, processes=layout.processes,
            workers=layout.workers, batch_size=layout.batch_size, seed=data.seed, split=self.split, order=data.order,
            shuffle_shards=data.shuffle_shards, toybox_weight=self.weights[TOYBOX], sources=sources,
        ).model_dump(mode="json")  # fmt: skip

    def resume(self, position: Mapping[str, Any], passes: int) -> None:
        """See `Resumable`. Says in a line what is not as it was.

        Raises:
            UserError: `position` is none of a stream.
        """
        old, data = read_position(position), self.data
        if old.split != self.split:
            raise UserError(f"the checkpoint's position is that of split {old.split!r}, not {self.split!r}")
        done = old.passes - old.begun_at
        same_layout = (old.processes, old.layout.lanes, old.batch_size) == (
            self.layout.processes, self.layout.lanes, self.layout.batch_size,
        )  # fmt: skip
        contents = {name: source.contents for name, source in old.sources.items()}
        same_sources = contents == {name: source.contents for name, source in self.sources.items()}
        same_order = (old.seed, old.order, old.shuffle_shards) == (data.seed, data.order, data.shuffle_shards)
        weights = {name: weight for name, weight in self.weights.items() if weight}
        same_weights = {name: weight for name, weight in old.weights.items() if weight} == weights
        if same_layout and same_sources and same_order and same_weights:
            self.begun_at = passes - done
            self.first_scene = old.first_scene
            for name, source in self.sources.items():
                source.begin(old.sources[name].begun, old.sources[name].seen, self.layout.slots)
            return
        self.begun_at = passes
        self.first_scene = old.first_scene + done * old.layout.samples_a_pass
        taken = self._taken(old.layout, Mixture(old.weights, old.seed), done)
        if not same_weights and same_sources:
            _say(f"data: weights changed from {_shown(old.weights)} to {_shown(weights)}; they hold from here on")
        for source in self.sources.values():
            self._go_on(source, old, taken)
        for name in sorted(contents.keys() - self.sources.keys()):
            _say(f"data.shards.{name}: no longer a source")

    def _go_on(self, source: ShardSource, old: Position, taken: Mapping[str, list[int]]) -> None:
        """Begin a source where another layout left it; with an epoch of its own where it is not the same source."""
        slots, name, kept = self.layout.slots, source.name, old.sources.get(source.name)
        if kept is None:
            _say(f"data.shards.{name}: a new source; it begins with its first epoch")
            source.begin(Begun(), 0.0, slots)
            return
        seen = kept.seen + sum(taken[name]) / kept.samples
        changed = [
            what
            for what, differs in (
                ("the shards", kept.contents != source.contents),
                ("data.seed", old.seed != self.data.seed),
                ("data.order", old.order != self.data.order),
            )
            if differs
        ]
        if changed:
            _say(f"data.shards.{name}: {' and '.join(changed)} changed; a new epoch begins")
            source.begin(Begun(kept.epoch + sum(taken[name]) // kept.samples + 1), seen, slots)
            return
        before = source.order_for(kept.begun, old.layout.slots, old.seed, old.order, old.shuffle_shards)
        source.begin(before.after(taken[name]), seen, slots)

    def _place(self, number: int) -> tuple[int, int]:
        local = number - self.begun_at * self.layout.samples_a_pass
        if local < 0:
            raise IndexError(f"sample {number} lies before the pass where this run goes on, {self.begun_at}")
        return self.layout.place(local)

    @staticmethod
    def _taken(layout: Layout, mixture: Mixture, passes: int) -> dict[str, list[int]]:
        """By source, how many of its samples each slot has read after so many passes."""
        slots = [mixture.taken(slot, layout.taken(slot, passes)) for slot in range(layout.slots)]
        return {name: [taken[name] for taken in slots] for name in mixture.names}

    def _count(self, source: ShardSource, place: SamplePlace, error: UserError) -> None:
        whole = source.reader.is_damaged(source.numbers[place.shard])
        if whole is not None:
            self.damage.damaged_shard(place.source, place.shard, whole)
        else:
            self.damage.damaged_sample(place.source, place.shard, place.row, error)


def _shown(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name or 'toybox'}={weight:g}" for name, weight in sorted(weights.items()) if weight)


def _say(line: str) -> None:
    """One line for the run, not one for each of its processes."""
    if os.environ.get("RANK", "0") == "0":
        print(line, flush=True)
