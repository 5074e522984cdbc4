"""One source of shards in a stream: its list, its order for a layout, its rows for training or validation, its reader.

Every 32nd sample of a shard is kept for validation, whatever is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.record import Sample
from train.settings import DataSettings, ShardsSource
from train.stream.seeding import name_number
from train.stream.shard_list import ShardEntry, list_shards_of
from train.stream.shard_order import Begun, ResampledOrder, ShardOrder
from train.stream.shard_reader import ShardReader

HELD_EVERY = 32  # one in so many samples of a shard is for validation

Split = Literal["train", "val"]


def rows_of(samples: int, split: Split) -> int:
    """How many of a shard's samples belong to a split."""
    held = samples // HELD_EVERY
    return held if split == "val" else samples - held


def row_of(number: int, split: Split) -> int:
    """Row in the shard of a split's sample `number`: rows 31, 63 … are held."""
    if split == "val":
        return number * HELD_EVERY + HELD_EVERY - 1
    return number + number // (HELD_EVERY - 1)


def another_row(samples: int, row: int, number: int) -> int:
    """One of the other rows of a shard's samples that are of the split of `row`, chosen by `number`."""
    split: Split = "val" if row % HELD_EVERY == HELD_EVERY - 1 else "train"
    place = row // HELD_EVERY if split == "val" else row - row // HELD_EVERY
    count = rows_of(samples, split)
    return row_of((place + 1 + number % max(count - 1, 1)) % count, split)


class ShardSource:
    """See the module's text."""

    def __init__(self, name: str, settings: ShardsSource, data: DataSettings, split: Split) -> None:
        """
        Raises:
            UserError: no shards, or none with a sample of this split.
        """
        self.name, self.data, self.split = name, data, split
        scratch = Path(data.scratch).expanduser()
        listed = list_shards_of(name, settings, scratch)
        self.contents = listed.contents
        listed.entries[:] = [entry for entry in listed.entries if rows_of(entry.samples, split)]
        if not listed.entries:
            wanted = "a sample" if split == "train" else f"{HELD_EVERY} samples; every {HELD_EVERY}nd is for validation"
            raise UserError(f"data.shards.{name}: no finished shard has {wanted}; build larger shards")
        self.entries = listed.entries
        self.names = [entry.name for entry in self.entries]
        self.numbers = {entry.name: number for number, entry in enumerate(self.entries)}
        self.sizes = np.array([rows_of(entry.samples, split) for entry in self.entries], dtype=np.int64)  # (S,)
        self.reader = ShardReader(listed, scratch, data.shuffle_shards)
        self.order: ShardOrder
        self.seen = 0.0  # epochs read before the order began

    @property
    def samples(self) -> int:
        """Samples an epoch."""
        return int(self.sizes.sum())

    def begin(self, begun: Begun, seen: float, slots: int) -> None:
        """Make the order for a layout.

        Raises:
            UserError: fewer samples than slots.
        """
        if self.samples < slots:
            advice = "lower data.workers, or add shards"
            raise UserError(f"data.shards.{self.name}: {self.samples} samples for {slots} loading processes; {advice}")
        data = self.data
        self.order = self.order_for(begun, slots, data.seed, data.order, data.shuffle_shards)
        self.seen = seen
        self._opened: dict[int, int] = {}  # slot -> start of the window whose shards were asked for

    def order_for(self, begun: Begun, slots: int, seed: int, kind: str, window: int) -> ShardOrder:
        """The order of these shards under any layout and settings, a checkpoint's for example."""
        order = ShardOrder if kind == "epochs" else ResampledOrder
        return order(self.name, self.names, self.sizes, slots=slots, seed=seed, window=window, begun=begun)

    def rows(self, slot: int, position: int) -> Iterator[tuple[ShardEntry, int, int]]:
        """Shard, row and turn of a slot's sample, then of those that take its place where it is damaged: the others of
        its window in turn, then those of the next windows; as many as the source has."""
        tried = 0
        window = self.order.window(slot, position)
        offset = position - window.start
        while tried < self.samples:
            for step in range(len(window.order)):
                part, number = window.item((offset + step) % len(window.order))
                yield self.entries[part.shard], row_of(number, self.split), part.turn
                tried += 1
            window, offset = self.order.following(slot, window), 0

    def ahead(self, slot: int, position: int) -> None:
        """Have the shards of a slot's window opened, and those of its next one; once a window."""
        window = self.order.window(slot, position)
        if self._opened.get(slot) != window.start:
            self._opened[slot] = window.start
            parts = window.parts
            if self.split == "train":
                parts += self.order.following(slot, window).parts
            self.reader.want(slot, dict.fromkeys(part.shard for part in parts))

    def sample(self, entry: ShardEntry, row: int) -> Sample:
        """A sample, still encoded.

        Raises:
            Damaged: it is not as it should be.
            UserError: its shard cannot be read.
        """
        return self.reader.sample(self.numbers[entry.name], row)

    def seed(self, shard: str, row: int, turn: int) -> tuple[int, ...]:
        """Of all that is drawn for a sample in one epoch: the same under every layout."""
        return self.data.seed % 2**64, name_number(f"{self.name}/{shard}"), row, turn
