"""Several sources in exact proportions: each slot repeats a block in which every source has its share of the places.

The places of a block are permuted anew each time, seeded by (seed, slot, block): which source stands at a position, and
how far that source has come there, is arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from data_pipeline.errors import UserError
from train.stream.seeding import generator

TOYBOX = ""  # the name of no section of data.shards
MOST_PLACES = 1000  # of a block; weights that need more are rounded to thousandths, none to nothing


class Mixture:
    """The sources with a weight over 0, by name."""

    def __init__(self, weights: Mapping[str, float], seed: int) -> None:
        shares = {name: Fraction(str(weight)) for name, weight in sorted(weights.items()) if weight > 0}
        if not shares:
            raise UserError("data: every source has weight 0; give one of them a weight, or name shards")
        whole = math.lcm(*(share.denominator for share in shares.values()))
        counts = np.array([int(share * whole) for share in shares.values()], dtype=object)
        counts //= math.gcd(*counts)
        if counts.sum() > MOST_PLACES:
            counts = np.array([max(1, round(MOST_PLACES * count / counts.sum())) for count in counts], dtype=object)
        self.names, self.seed = list(shares), seed
        self.counts = counts.astype(np.int64)  # (sources,) places in a block
        self.places = int(self.counts.sum())
        self._last: tuple[tuple[int, int], np.ndarray] | None = None

    def place(self, slot: int, position: int) -> tuple[str, int]:
        """The source at a slot's position, and how many of the slot's positions before have gone to it."""
        block, within = divmod(position, self.places)
        pattern = self._pattern(slot, block)
        source = int(pattern[within])
        return self.names[source], block * int(self.counts[source]) + int((pattern[:within] == source).sum())

    def taken(self, slot: int, positions: int) -> dict[str, int]:
        """How many of a slot's first `positions` go to each source."""
        block, within = divmod(positions, self.places)
        seen = np.bincount(self._pattern(slot, block)[:within], minlength=len(self.names)) + block * self.counts
        return {name: int(count) for name, count in zip(self.names, seen, strict=True)}

    def _pattern(self, slot: int, block: int) -> np.ndarray:
        """(places,) number of the source at each place of a block."""
        if self._last is None or self._last[0] != (slot, block):
            sources = np.repeat(np.arange(len(self.names)), self.counts)
            self._last = (slot, block), generator(self.seed, "mixture", slot, block).permutation(sources)
        return self._last[1]
