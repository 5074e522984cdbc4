"""Near-duplicates: exact for the stated distance, the same whoever hashed first, copies found and others left alone."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from data_pipeline.duplicates import Copy, DuplicateIndex, PictureHash, first_within
from data_pipeline.images import perceptual_hash
from data_pipeline.toybox.world import ToyboxWorld


def by_brute_force(hashes: np.ndarray, distance: int) -> list[int]:
    """The definition, pair by pair."""
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= distance  # (N, N)
    return [int(np.flatnonzero(row)[0]) for row in near]


def clustered(count: int, seed: int) -> np.ndarray:
    """Hashes of which many are a few bits from another."""
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    for _ in range(count // 2):
        value = hashes[rng.integers(count)]
        for bit in rng.choice(64, rng.integers(0, 11), replace=False):
            value ^= np.uint64(1) << np.uint64(bit)
        hashes[rng.integers(count)] = value
    return hashes


@pytest.mark.parametrize("distance", range(9))
def test_the_search_is_exact(distance: int) -> None:
    for seed in range(3):
        hashes = clustered(700, seed)
        assert first_within(hashes, distance).tolist() == by_brute_force(hashes, distance)


def test_every_pair_of_bits_at_the_distance_is_found_and_none_beyond() -> None:
    rng = np.random.default_rng(0)
    for distance in (1, 4):
        for _ in range(50):
            base = rng.integers(0, 2**64, dtype=np.uint64)
            bits = rng.choice(64, distance + 1, replace=False).astype(np.uint64)
            near = base ^ np.bitwise_or.reduce(np.uint64(1) << bits[:-1])
            far = base ^ np.bitwise_or.reduce(np.uint64(1) << bits)
            assert first_within(np.array([base, near]), distance).tolist() == [0, 0]
            assert first_within(np.array([base, far]), distance).tolist() == [0, 1]


def test_few_hashes_and_equal_hashes() -> None:
    assert first_within(np.zeros(0, dtype=np.uint64), 4).tolist() == []
    assert first_within(np.array([7], dtype=np.uint64), 4).tolist() == [0]
    assert first_within(np.full(5000, 7, dtype=np.uint64), 4).tolist() == [0] * 5000


def picture_hash(position: int, key: str, content: str, value: int) -> PictureHash:
    return PictureHash(position, key, hashlib.sha256(content.encode()).hexdigest(), value)


UNITS = {
    "a": [picture_hash(0, "a0", "one", 0), picture_hash(2, "a2", "two", 0xFFFF_0000)],
    "b": [picture_hash(0, "b0", "one", 0), picture_hash(1, "b1", "three", 0b111), picture_hash(2, "b2", "four", 0xFF)],
    "c": [picture_hash(0, "c0", "five", 0xFFFF_0001)],
}


def index_of(order: str, distance: int | None = 4) -> DuplicateIndex:
    index = DuplicateIndex(["a", "b", "c"], distance)
    for name in order:
        index.add(name, UNITS[name])
    return index


@pytest.mark.parametrize("order", ["abc", "cba", "bca"])
def test_the_earlier_unit_keeps_its_picture_whoever_was_hashed_first(order: str) -> None:
    index = index_of(order)
    assert index.copies("a") == []
    assert index.copies("b") == [Copy(0, "b0", "a", "a0", 0, True), Copy(1, "b1", "a", "a0", 3, False)]
    assert index.copies("c") == [Copy(0, "c0", "a", "a2", 1, False)]


def test_without_a_distance_only_equal_bytes_are_copies() -> None:
    index = index_of("abc", None)
    assert [index.copies(name) for name in "abc"] == [[], [Copy(0, "b0", "a", "a0", 0, True)], []]


def test_units_are_known_and_all_given() -> None:
    index = DuplicateIndex(["a", "b"])
    with pytest.raises(ValueError, match="unit c"):
        index.add("c", [])
    index.add("a", UNITS["a"])
    with pytest.raises(ValueError, match="unit a"):
        index.add("a", [])
    with pytest.raises(ValueError, match="unit b: not given yet"):
        index.copies("a")
    index.add("b", [])
    assert index.copies("a") == index.copies("b") == []


def test_a_distance_that_cannot_be_searched_is_refused() -> None:
    with pytest.raises(ValueError, match="distance=20"):
        DuplicateIndex(["a"], 20)


def test_scenes_saved_anew_are_copies_and_other_scenes_are_not() -> None:
    world = ToyboxWorld("val", size=256, min_subjects=1)
    originals, copies = [], []
    for number in range(12):
        scene = world.scene(number).image
        small = Image.fromarray(scene).resize((128, 128), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=75)
        originals.append(picture_hash(number, f"o{number}", f"o{number}", perceptual_hash(scene)))
        copies.append(picture_hash(number, f"c{number}", f"c{number}", perceptual_hash(np.array(Image.open(buffer)))))
    index = DuplicateIndex(["originals", "copies"])
    index.add("copies", copies)
    index.add("originals", originals)
    assert index.copies("originals") == []
    assert [(copy.key, copy.of_key) for copy in index.copies("copies")] == [(f"c{i}", f"o{i}") for i in range(12)]
