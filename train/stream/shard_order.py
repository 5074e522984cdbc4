"""The order of one source's shards, by arithmetic: slot and position -> shard and sample, for any epoch.

The shards of all epochs, each a permutation of its own, are dealt to the slots in turn; what a slot gets in an epoch it
reads in windows of some shards, whose samples are permuted together. Position i of a slot is therefore a function of
(seed, source, slots, i). With fewer shards than slots, shards are dealt in parts. A run that goes on with another
number of slots begins with the shards that no slot had finished.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from train.stream.seeding import generator

DRAWN_WINDOWS = 64  # of a slot's shards that are drawn with replacement, at once

Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class Part:
    """Samples part, part + parts, part + 2·parts … of a shard."""

    shard: int
    part: int
    parts: int
    turn: int  # the epoch, or the number of the draw: distinguishes one reading of a shard from another


@dataclass(frozen=True)
class Window:
    """Parts of shards whose samples are shuffled together."""

    parts: tuple[Part, ...]
    ends: np.ndarray  # (parts,) samples up to and with each part
    start: int  # position of the first sample in the slot
    order: np.ndarray  # (samples,) permutation

    @property
    def end(self) -> int:
        return self.start + len(self.order)

    def item(self, offset: int) -> tuple[Part, int]:
        """The part and the sample of its shard that stand at `offset`."""
        sample = int(self.order[offset])
        number = int(np.searchsorted(self.ends, sample, side="right"))
        part = self.parts[number]
        before = int(self.ends[number - 1]) if number else 0
        return part, (sample - before) * part.parts + part.part


@dataclass(frozen=True)
class Begun:
    """Where a run's order begins: the running epoch, without the shards that were finished under another layout."""

    epoch: int = 0
    finished: Mapping[int, Ranges] = field(default_factory=dict)  # epoch -> places in its permutation of the shards


@dataclass(frozen=True)
class _Deal:
    """What is dealt in one epoch."""

    places: np.ndarray  # (left,) places in the permutation that are not finished yet
    shards: np.ndarray  # (left,) the shards there
    parts: int  # each shard is dealt in so many

    @property
    def total(self) -> int:
        return len(self.shards) * self.parts


@dataclass(frozen=True)
class _Share:
    """A slot's share of an epoch."""

    dealt: np.ndarray  # (parts,) numbers in the deal
    parts: tuple[Part, ...]
    ends: np.ndarray  # (parts,) samples up to and with each


class ShardOrder:
    """Shards in epochs: each sample once an epoch, whatever the number of slots."""

    def __init__(
        self, source: str, names: Sequence[str], sizes: np.ndarray, *, slots: int, seed: int, window: int, begun: Begun
    ) -> None:
        """
        Args:
            names: of the S shards.
            sizes: (S,) samples of each, at least 1.
            window: shards whose samples are shuffled together.
        """
        self.source, self.names, self.sizes = source, names, sizes
        self.slots, self.seed, self.window_shards, self.begun = slots, seed, window, begun
        self._starts = [np.zeros(slots, np.int64)]  # by epoch, (slots,) position of each one's first sample
        self._dealt_before = [0]  # parts dealt before each epoch
        self._deals: dict[int, _Deal] = {}
        self._shares: dict[int, tuple[int, _Share]] = {}  # slot -> epoch and its share, as last asked for
        self._windows: dict[int, Window] = {}  # slot -> as last asked for

    def window(self, slot: int, position: int) -> Window:
        """The window of a slot that holds its sample number `position`."""
        last = self._windows.get(slot)
        if last is None or not last.start <= position < last.end:
            last = self._windows[slot] = self._window(slot, position)
        return last

    def following(self, slot: int, window: Window) -> Window:
        """The slot's window after `window`; not kept."""
        return self._window(slot, window.end)

    def _window(self, slot: int, position: int) -> Window:
        epoch = self.epoch(slot, position)
        start = int(self._starts[epoch - self.begun.epoch][slot])
        share = self._share(slot, epoch)
        ends = _window_ends(share.ends, self.window_shards)
        first = int(np.searchsorted(ends, position - start, side="right")) * self.window_shards
        parts = share.parts[first : first + self.window_shards]
        before = int(share.ends[first - 1]) if first else 0
        inside = share.ends[first : first + self.window_shards] - before
        names = [f"{self.names[part.shard]}/{part.part}" for part in parts]
        order = generator(self.seed, "window", self.source, epoch, slot * self.slot_matters, *names)
        return Window(parts, inside, start + before, order.permutation(int(inside[-1])))

    slot_matters = 0  # two slots never read the same in one epoch

    def epoch(self, slot: int, position: int) -> int:
        """The epoch in which a slot's sample number `position` is read."""
        starts = self._starts
        while position >= starts[-1][slot]:
            starts.append(starts[-1] + self._samples(self.begun.epoch + len(starts) - 1))
        return self.begun.epoch + bisect_right(starts, position, key=lambda start: int(start[slot])) - 1

    def after(self, taken: Sequence[int]) -> Begun:
        """Where to begin when each slot has read the first `taken[slot]` of its samples."""
        epochs = [self.epoch(slot, count) for slot, count in enumerate(taken)]
        finished: dict[int, Ranges] = {}
        first = max(epochs) + 1
        for epoch in range(max(epochs), min(epochs) - 1, -1):
            done = self._finished(epoch, epochs, taken)
            if done.all():
                finished[epoch] = _ranges(done)
                continue
            first = epoch
            if done.any():
                finished[epoch] = _ranges(done)
        return Begun(first, {epoch: ranges for epoch, ranges in sorted(finished.items()) if epoch >= first})

    def _finished(self, epoch: int, epochs: Sequence[int], taken: Sequence[int]) -> np.ndarray:
        """(S,) bool: the places in the epoch's permutation whose shards were read whole, by all slots together."""
        deal = self._deal(epoch)
        read = np.zeros(deal.total, dtype=bool)
        for slot, count in enumerate(taken):
            if epochs[slot] < epoch:
                continue
            share = self._share(slot, epoch)
            whole = len(share.dealt)
            if epochs[slot] == epoch:
                position = count - int(self._starts[epoch - self.begun.epoch][slot])
                windows = _window_ends(share.ends, self.window_shards)
                whole = int((windows <= position).sum()) * self.window_shards
            read[share.dealt[:whole]] = True
        done = np.ones(len(self.sizes), dtype=bool)
        done[deal.places] = read.reshape(-1, deal.parts).all(axis=1)
        return done

    def _deal(self, epoch: int) -> _Deal:
        if epoch not in self._deals:
            permutation = generator(self.seed, "epoch", self.source, epoch).permutation(len(self.sizes))
            left = np.ones(len(permutation), dtype=bool)
            for first, last in self.begun.finished.get(epoch, []):
                left[first:last] = False
            places = np.flatnonzero(left)
            parts = -(-self.slots // len(places)) if len(places) else 1
            if len(self._deals) >= 2:  # slots are near one another: this epoch and the next
                del self._deals[min(self._deals)]
            self._deals[epoch] = _Deal(places, permutation[places], parts)
        return self._deals[epoch]

    def _samples(self, epoch: int) -> np.ndarray:
        """(slots,) samples that each gets in an epoch."""
        deal = self._deal(epoch)
        numbers = np.arange(deal.total)
        sizes = -(-(self.sizes[deal.shards[numbers // deal.parts]] - numbers % deal.parts) // deal.parts)
        slots = (self._before(epoch) + numbers) % self.slots
        return np.bincount(slots, weights=sizes, minlength=self.slots).astype(np.int64)

    def _share(self, slot: int, epoch: int) -> _Share:
        if self._shares.get(slot, (None,))[0] != epoch:
            self._shares[slot] = epoch, self._share_of(slot, epoch)
        return self._shares[slot][1]

    def _share_of(self, slot: int, epoch: int) -> _Share:
        deal = self._deal(epoch)
        dealt = np.arange((slot - self._before(epoch)) % self.slots, deal.total, self.slots)
        shards, parts = deal.shards[dealt // deal.parts], dealt % deal.parts
        sizes = -(-(self.sizes[shards] - parts) // deal.parts)
        pairs = zip(shards.tolist(), parts.tolist(), strict=True)
        return _Share(dealt, tuple(Part(shard, part, deal.parts, epoch) for shard, part in pairs), np.cumsum(sizes))

    def _before(self, epoch: int) -> int:
        """Parts dealt before an epoch. Dealing goes on where it stopped, so that no slot gets more in the long run."""
        while len(self._dealt_before) <= epoch - self.begun.epoch:
            number = self.begun.epoch + len(self._dealt_before) - 1
            left = len(self.sizes) - sum(last - first for first, last in self.begun.finished.get(number, []))
            total = left * -(-self.slots // left) if left else 0
            self._dealt_before.append(self._dealt_before[-1] + total)
        return self._dealt_before[epoch - self.begun.epoch]


class ResampledOrder(ShardOrder):
    """Shards drawn with replacement by each slot; an "epoch" is some draws of one slot. Nothing is ever finished."""

    slot_matters = 1

    def after(self, taken: Sequence[int]) -> Begun:
        """Draws that were not made before."""
        return Begun(max(self.epoch(slot, count) for slot, count in enumerate(taken)) + 1)

    def _samples(self, epoch: int) -> np.ndarray:
        return np.array([self._share_of(slot, epoch).ends[-1] for slot in range(self.slots)])

    def _share_of(self, slot: int, epoch: int) -> _Share:
        count = DRAWN_WINDOWS * self.window_shards
        shards = generator(self.seed, "draws", self.source, slot, epoch).integers(0, len(self.sizes), count)
        first = (epoch * self.slots + slot) * count
        parts = tuple(Part(shard, 0, 1, first + number) for number, shard in enumerate(shards.tolist()))
        return _Share(np.arange(count), parts, np.cumsum(self.sizes[shards]))


def _window_ends(ends: np.ndarray, window: int) -> np.ndarray:
    """(windows,) samples up to and with each window of so many parts."""
    last = ends[window - 1 :: window]
    return last if len(ends) % window == 0 else np.append(last, ends[-1])


def _ranges(places: np.ndarray) -> Ranges:
    """The true places of (S,) bool as [first, last) pairs."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], places, [False]])))
    return [(int(first), int(last)) for first, last in zip(edges[::2], edges[1::2], strict=True)]
