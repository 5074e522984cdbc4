"""Near-duplicates: which pictures are later copies of an earlier one, by sha256 and by perceptual hash.

A copy is a picture with an earlier one (order of the units, then of their samples) that has the same bytes, or a hash
at Hamming distance `distance` or less. The answer is exact and depends on that order only, not on who hashed first.

Search: 64 bits are cut into distance + 2 bands; two hashes within `distance` differ in at most that many bands, so
they agree in some two of them. For each pair of bands the hashes are sorted by these bits and only those that agree
are compared (multi-index hashing; Manku, Jain & Sarma, "Detecting near-duplicates for web crawling", 2007).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

HASH_BITS = 64
MAX_DISTANCE = 8
# Measured with pHash on toybox scenes. Of 400 saved anew (JPEG 40 to 95, WebP 80), halved, quartered, enlarged or
# stretched by 5 %, all copies are within 4 bits (2 bits: 98.5 % or more), 99 % of those 10 % brighter, 96 % of those
# with 2 % cropped away. Of 2,000 different ones a single pair is that near (6 bits: 2 pairs, 8: 11, 10: 38).
# dHash at 4 bits: 97.5 % of the copies, 19 pairs.
DEFAULT_DISTANCE = 4
_STEP = 1 << 20  # comparisons at a time


@dataclass(frozen=True)
class PictureHash:
    """One picture of a unit."""

    position: int  # in its unit
    key: str
    sha256: str
    perceptual_hash: int  # 64 bit


@dataclass(frozen=True)
class Copy:
    """A later picture, and the earliest one that it is a copy of."""

    position: int  # of the later one, in its unit
    key: str
    of_unit: str
    of_key: str
    distance: int  # bits between their hashes
    same_bytes: bool


class DuplicateIndex:
    """Collects the hashes of all units, in any order; then tells the copies of each. About 200 bytes a picture."""

    def __init__(self, unit_names: Sequence[str], distance: int | None = DEFAULT_DISTANCE) -> None:
        """Begin an index.

        Args:
            unit_names: all units in the order of the source: it decides which of two pictures is the earlier.
            distance: bits that may differ; None: only equal bytes are copies.
        """
        if distance is not None and not 0 <= distance <= MAX_DISTANCE:
            raise ValueError(f"distance={distance}: expected 0 to {MAX_DISTANCE}, or None")
        self.unit_names = list(unit_names)
        self.distance = distance
        self._known = set(unit_names)
        self._units: dict[str, _Unit] = {}
        self._copies: dict[str, list[Copy]] | None = None

    def add(self, unit_name: str, pictures: Sequence[PictureHash]) -> None:
        """Give the hashes of one unit."""
        if unit_name not in self._known or unit_name in self._units:
            raise ValueError(f"unit {unit_name}: unknown, or given before")
        ordered = sorted(pictures, key=lambda picture: picture.position)
        self._units[unit_name] = _Unit(
            positions=np.array([picture.position for picture in ordered], dtype=np.int64),
            keys=[picture.key for picture in ordered],
            contents=np.frombuffer(b"".join(bytes.fromhex(p.sha256)[:16] for p in ordered), dtype=">u8").reshape(-1, 2),
            hashes=np.array([picture.perceptual_hash for picture in ordered], dtype=np.uint64),
        )
        self._copies = None

    def copies(self, unit_name: str) -> list[Copy]:
        """The copies in a unit, by position. The first call searches, all units must be there by then."""
        if self._copies is None:
            missing = [name for name in self.unit_names if name not in self._units]
            if missing:
                raise ValueError(f"unit {missing[0]}: not given yet")
            self._copies = self._search()
        return self._copies.get(unit_name, [])

    def _search(self) -> dict[str, list[Copy]]:
        units = [self._units[name] for name in self.unit_names]
        contents = np.concatenate([np.zeros((0, 2), dtype=">u8"), *(unit.contents for unit in units)])
        hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *(unit.hashes for unit in units)])
        earliest = _first_equal(contents.astype(np.uint64))
        if self.distance is not None:
            earliest = np.minimum(earliest, first_within(hashes, self.distance))
        starts = np.cumsum([0, *(len(unit.keys) for unit in units)])
        found: dict[str, list[Copy]] = {}
        for later in np.flatnonzero(earliest < np.arange(len(hashes))):
            first = int(earliest[later])
            a, b = (int(np.searchsorted(starts, i, side="right")) - 1 for i in (first, later))
            i, j = first - int(starts[a]), int(later) - int(starts[b])
            copy = Copy(
                position=int(units[b].positions[j]),
                key=units[b].keys[j],
                of_unit=self.unit_names[a],
                of_key=units[a].keys[i],
                distance=int(np.bitwise_count(hashes[first] ^ hashes[later])),
                same_bytes=bool((contents[first] == contents[later]).all()),
            )
            found.setdefault(self.unit_names[b], []).append(copy)
        return found


@dataclass(frozen=True)
class _Unit:
    positions: np.ndarray  # (N,) int64
    keys: list[str]
    contents: np.ndarray  # (N, 2) uint64: the first 128 bits of the sha256
    hashes: np.ndarray  # (N,) uint64


def first_within(hashes: np.ndarray, distance: int) -> np.ndarray:
    """For each hash the smallest number of a hash at most `distance` bits away; its own if none is earlier.

    Args:
        hashes: (N,) uint64.

    Memory: about 60 bytes a hash. Time grows with the pairs that agree in two bands: a million hashes that many
    pictures nearly share are the slow case.
    """
    unique, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)  # first: smallest number of each
    earliest = first.astype(np.int64)
    if distance and len(unique) > 1:
        for mask in _band_pairs(distance):
            _meet(unique, first, earliest, np.uint64(mask), distance)
    return earliest[inverse]


def _band_pairs(distance: int) -> list[int]:
    """Bit masks, each of two of the distance + 2 bands."""
    edges = np.linspace(0, HASH_BITS, distance + 3).round().astype(int)
    bands = [(1 << int(end)) - (1 << int(start)) for start, end in zip(edges[:-1], edges[1:], strict=True)]
    return [a | b for a, b in combinations(bands, 2)]


def _meet(unique: np.ndarray, first: np.ndarray, earliest: np.ndarray, mask: np.uint64, distance: int) -> None:
    """Compare all hashes that agree under the mask; lower `earliest` where an earlier one is near."""
    order = np.argsort(unique & mask)
    ordered = unique[order]
    for left, right in _pairs(ordered & mask):
        near = np.bitwise_count(ordered[left] ^ ordered[right]) <= distance
        a, b = order[left[near]], order[right[near]]
        np.minimum.at(earliest, a, first[b])
        np.minimum.at(earliest, b, first[a])


def _pairs(values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All pairs of places with equal values in a sorted array, some million at a time."""
    alive = np.flatnonzero(values[1:] == values[:-1])  # places whose neighbour at `step` is equal
    step = 1
    while len(alive):
        for start in range(0, len(alive), _STEP):
            left = alive[start : start + _STEP]
            yield left, left + step
        step += 1
        alive = alive[alive + step < len(values)]
        alive = alive[values[alive] == values[alive + step]]


def _first_equal(rows: np.ndarray) -> np.ndarray:
    """For each row (N, 2) the smallest number of an equal row, (N,) int64."""
    count = len(rows)
    order = np.lexsort((np.arange(count), rows[:, 1], rows[:, 0]))
    ordered = rows[order]
    new = np.ones(count, dtype=bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = order[np.maximum.accumulate(np.where(new, np.arange(count), 0))]
    earliest = np.empty(count, dtype=np.int64)
    earliest[order] = first
    return earliest
