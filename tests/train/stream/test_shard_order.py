"""The order of shards and samples: each once an epoch, and none lost when the number of slots changes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from train.stream.shard_order import Begun, ResampledOrder, ShardOrder

Item = tuple[int, int]  # shard, sample
SIZES = [5, 3, 8, 1, 4, 6, 2]


def order_of(sizes: list[int], slots: int, *, window: int = 2, begun: Begun | None = None, seed: int = 0) -> ShardOrder:
    names = [f"{number:05d}" for number in range(len(sizes))]
    return ShardOrder("s", names, np.array(sizes), slots=slots, seed=seed, window=window, begun=begun or Begun())


def items(order: ShardOrder, slot: int, positions: range) -> list[Item]:
    """What a slot reads, by random access."""
    found = []
    for position in positions:
        window = order.window(slot, position)
        part, sample = window.item(position - window.start)
        found.append((part.shard, sample))
    return found


def epochs(order: ShardOrder, slot: int, last: int) -> dict[int, list[Item]]:
    """What a slot reads, by epoch, up to the end of epoch `last`."""
    found: dict[int, list[Item]] = {}
    position = 0
    while (epoch := order.epoch(slot, position)) <= last:
        found.setdefault(epoch, []).extend(items(order, slot, range(position, position + 1)))
        position += 1
    return found


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("slots", [1, 2, 3, 7, 8, 20])
def test_each_sample_is_read_once_an_epoch_by_all_slots_together(slots: int, window: int) -> None:
    order = order_of(SIZES, slots, window=window)
    everything = sorted((shard, sample) for shard, size in enumerate(SIZES) for sample in range(size))
    slots_read = [epochs(order, slot, 3) for slot in range(slots)]
    for epoch in range(4):
        assert sorted(item for read in slots_read for item in read.get(epoch, [])) == everything


def test_epochs_windows_and_seeds_have_orders_of_their_own() -> None:
    order = order_of([40, 40], 1)
    first, second = items(order, 0, range(80)), items(order, 0, range(80, 160))
    assert sorted(first) == sorted(second) and first != second
    assert items(order_of([40, 40], 1, seed=1), 0, range(80)) != first
    assert {shard for shard, _ in first[:20]} == {0, 1}, "the samples of a window's shards are mixed"
    assert len({shard for shard, _ in items(order_of([40, 40], 1, window=1), 0, range(40))}) == 1


def test_a_position_is_the_same_however_it_is_reached() -> None:
    reference = items(order_of(SIZES, 3), 1, range(100))
    for start in (0, 1, 13, 57, 99):
        assert items(order_of(SIZES, 3), 1, range(start, 100)) == reference[start:]


def test_unequal_rounds_are_shared_by_all_slots() -> None:
    order = order_of([10] * 5, 4)  # five shards for four slots: who gets two changes from epoch to epoch
    starts = [order.epoch(slot, 10 * 25 - 1) for slot in range(4)]
    assert max(starts) - min(starts) <= 1 and starts[0] == pytest.approx(19, abs=1)


def test_what_is_finished_is_found_by_hand() -> None:
    order = order_of([4, 4, 4, 4, 4, 4], 2, window=1)  # each slot reads three shards an epoch, four samples each
    permutation = [shard for shard, _ in items(order_of([1] * 6, 1, window=1), 0, range(6))]
    dealt = [[order.window(slot, 4 * turn).parts[0].shard for turn in range(3)] for slot in range(2)]
    assert [dealt[0][0], dealt[1][0], dealt[0][1], dealt[1][1], dealt[0][2], dealt[1][2]] == permutation
    assert order.after([0, 0]) == Begun(0, {})
    assert order.after([4, 3]) == Begun(0, {0: [(0, 1)]})  # slot 0 has read one shard, slot 1 none to its end
    assert order.after([9, 8]) == Begun(0, {0: [(0, 4)]})
    assert order.after([12, 4]) == Begun(0, {0: [(0, 3), (4, 5)]})
    assert order.after([12, 12]) == Begun(1, {})
    assert order.after([17, 8]) == Begun(0, {0: [(0, 5)], 1: [(0, 1)]})  # slot 0 is in the next epoch
    assert order.after([12, 24]) == Begun(1, {1: [(1, 2), (3, 4), (5, 6)]})


@pytest.mark.parametrize("seed", range(8))
def test_no_sample_is_lost_when_the_slots_change_again_and_again(seed: int) -> None:
    rng = np.random.default_rng(seed)
    everything = {(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)}
    begun, seen = Begun(), dict[int, set[Item]]()
    for _ in range(4):
        slots = int(rng.integers(1, 9))
        order = order_of(SIZES, slots, window=int(rng.integers(1, 4)), begun=begun)
        taken = [int(count) for count in rng.integers(0, 60 // slots + 2, slots)]
        for slot, count in enumerate(taken):
            for position in range(count):
                seen.setdefault(order.epoch(slot, position), set()).update(
                    items(order, slot, range(position, position + 1))
                )
        begun = order.after(taken)
        assert all(seen[epoch] == everything for epoch in range(begun.epoch)), "what is passed over was read"
    last = order_of(SIZES, 3, begun=begun)
    for slot in range(3):
        for epoch, found in epochs(last, slot, begun.epoch + 2).items():
            seen.setdefault(epoch, set()).update(found)
    assert all(seen[epoch] == everything for epoch in range(begun.epoch + 3))


def test_finished_shards_are_not_read_again() -> None:
    before = order_of([4] * 6, 2, window=1)
    read = {shard for slot in range(2) for shard, _ in items(before, slot, range(8))}
    after = order_of([4] * 6, 3, window=1, begun=before.after([8, 8]))
    rest = [epochs(after, slot, 0).get(0, []) for slot in range(3)]
    assert {shard for part in rest for shard, _ in part} == set(range(6)) - read and len(read) == 4
    assert Counter(item for part in rest for item in part).most_common(1)[0][1] == 1
    assert all(rest), "two shards are left for three slots: they are cut, and every slot reads on"


def test_resampled_shards_are_drawn_with_replacement() -> None:
    names = [f"{number:05d}" for number in range(4)]
    arguments = {"sizes": np.array([2] * 4), "slots": 2, "seed": 0, "window": 1}
    order = ResampledOrder("s", names, begun=Begun(), **arguments)
    shards = [[shard for shard, _ in items(order, slot, range(0, 400))][::2] for slot in range(2)]
    assert shards[0] != shards[1]
    counts = Counter(shards[0] + shards[1])
    assert set(counts) == {0, 1, 2, 3} and all(70 < count < 130 for count in counts.values())
    assert any(a == b for a, b in zip(shards[0], shards[0][1:], strict=False)), "the same shard twice in a row"
    on = ResampledOrder("s", names, begun=order.after([200, 220]), **arguments)
    assert [shard for shard, _ in items(on, 0, range(0, 400))][::2] != shards[0], "other draws from there on"
