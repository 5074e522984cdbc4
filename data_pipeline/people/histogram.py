"""A histogram of a stream of numbers whose range nobody knows beforehand, in bounded memory.

Bins are multiples of a step; when they become too many the step doubles and neighbours merge, so the result does not
depend on how the stream was cut into batches. Mean and ends are exact, quantiles are right to a bin's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, isfinite, log10

import numpy as np

MOST_BINS = 1024  # that are kept; about 16 kB
_TINY = 1e-9  # of a bin: 0.3 / 0.1 is 2.9999999999999996, and yet belongs to the bin that starts at 0.3


@dataclass(frozen=True)
class Bar:
    """A bin to be drawn."""

    low: float
    high: float
    count: int


class Histogram:
    """Counts of numbers in bins of `step`, which doubles as often as it must."""

    def __init__(self, step: float, top: float = inf, whole: bool = False) -> None:
        """An empty one.

        Args:
            step: width of a bin at first; how finely the numbers are worth telling apart.
            top: a natural upper end (1 of a share): a number that equals it belongs to the bin below.
            whole: the numbers are integers, each a bin of its own as long as they are few.
        """
        self.step, self.top, self.whole = step, top, whole
        self.count, self.total = 0, 0.0
        self.low, self.high = inf, -inf
        self._first = 0  # index of the first bin: bin i holds i * step <= value < (i + 1) * step
        self._counts = np.zeros(0, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count numbers; those that are not finite are left out."""
        values = np.asarray(values, np.float64).ravel()  # (N,)
        values = values[np.isfinite(values)]
        if not len(values):
            return
        self.count += len(values)
        self.total += float(values.sum())
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        # A number beyond what integers can index would overflow; such steps are skipped at once.
        while max(abs(float(values.min())), abs(float(values.max()))) / self.step > 2**52:
            self._double()
        bins = self._bins(values)  # (N,)
        while self._span(int(bins.min()), int(bins.max())) > MOST_BINS:
            self._double()
            bins >>= 1
        self._make_room(int(bins.min()), int(bins.max()))
        self._counts += np.bincount(bins - self._first, minlength=len(self._counts))

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else float("nan")

    def quantile(self, share: float) -> float:
        """The number below which that share lies, linear within its bin; a whole number where all are."""
        if not self.count:
            return float("nan")
        wanted, below = share * self.count, 0
        for i, count in enumerate(self._counts.tolist()):
            if count and below + count >= wanted:
                if self.whole and self.step == 1:
                    return float(self._first + i)
                place = (self._first + i + (wanted - below) / count) * self.step
                return min(max(place, self.low), self.high)
            below += count
        return self.high

    def bars(self, most: int = 40, beyond: float = 0.0) -> list[Bar]:
        """At most so many bins of equal and round width, empty ones between them included.

        Args:
            most: bars; neighbours are merged until they are as few.
            beyond: share of the numbers that may be counted in the last bar although they lie above it, so that a few
                wild ones do not push all others into a corner.
        """
        if not self.count:
            return []
        end = self._first + len(self._counts)
        if beyond and len(self._counts) > most:
            behind = np.cumsum(self._counts[::-1])[::-1]  # numbers in this bin and above
            near = max(1, int((behind > beyond * self.count).sum()))
            end = self._first + near if near < 0.75 * len(behind) else end  # else little would be gained
        merged = _round_factor((end - self._first) / most, 1 if self.whole else self.step)
        start = floor(self._first / merged)
        while ceil(end / merged) - start > most:
            merged = _round_factor(merged + 1, 1 if self.whole else self.step)
            start = floor(self._first / merged)
        counts = np.zeros(max(1, ceil(end / merged) - start), np.int64)
        places = (np.arange(len(self._counts)) + self._first) // merged - start
        np.add.at(counts, np.minimum(places, len(counts) - 1), self._counts)
        width = merged * self.step
        return [Bar((start + i) * width, (start + i + 1) * width, n) for i, n in enumerate(counts.tolist())]

    def _bins(self, values: np.ndarray) -> np.ndarray:
        bins = np.floor(values / self.step + _TINY).astype(np.int64)
        if isfinite(self.top):
            bins[np.abs(values - self.top) < _TINY * self.step] = ceil(self.top / self.step - _TINY) - 1
        return bins

    def _span(self, low: int, high: int) -> int:
        if not len(self._counts):
            return high - low + 1
        return max(high + 1, self._first + len(self._counts)) - min(low, self._first)

    def _double(self) -> None:
        self.step *= 2
        if not len(self._counts):
            return
        first = self._first >> 1
        counts = np.zeros(((self._first + len(self._counts) - 1) >> 1) - first + 1, np.int64)
        np.add.at(counts, ((np.arange(len(self._counts)) + self._first) >> 1) - first, self._counts)
        self._first, self._counts = first, counts

    def _make_room(self, low: int, high: int) -> None:
        if not len(self._counts):
            self._first, self._counts = low, np.zeros(high - low + 1, np.int64)
            return
        before, after = max(0, self._first - low), max(0, high + 1 - self._first - len(self._counts))
        self._counts = np.pad(self._counts, (before, after))
        self._first -= before


def _round_factor(least: float, step: float) -> int:
    """The smallest number of bins >= `least` that together are as wide as a round number, if steps allow it."""
    factors: Sequence[int] = range(ceil(max(1, least)), 4 * ceil(max(1, least)) + 1)
    return next((n for n in factors if _is_round(n * step)), ceil(max(1, least)))


def _is_round(width: float) -> bool:
    mantissa = width / 10.0 ** floor(log10(width) + _TINY)
    return any(abs(mantissa - one) < 1e-6 for one in (1, 2, 2.5, 4, 5))
