"""Sources in exact proportions."""

from __future__ import annotations

from collections import Counter

import pytest

from data_pipeline.errors import UserError
from train.stream.mixture import Mixture


def test_every_block_holds_exactly_the_shares() -> None:
    mixture = Mixture({"a": 0.5, "b": 0.3, "c": 0.2, "never": 0.0}, seed=0)
    assert mixture.names == ["a", "b", "c"] and mixture.counts.tolist() == [5, 3, 2]
    blocks = [[mixture.place(4, position)[0] for position in range(start, start + 10)] for start in (0, 10, 20)]
    assert all(Counter(block) == {"a": 5, "b": 3, "c": 2} for block in blocks)
    assert blocks[0] != blocks[1], "each block in an order of its own"
    assert blocks[0] != [mixture.place(5, position)[0] for position in range(10)], "and each slot"


def test_a_source_goes_on_one_by_one() -> None:
    mixture = Mixture({"a": 1.0, "b": 2.5}, seed=3)
    assert mixture.counts.tolist() == [2, 5]
    come = Counter[str]()
    for position in range(50):
        assert mixture.taken(1, position) == {"a": come["a"], "b": come["b"]}
        name, index = mixture.place(1, position)
        assert index == come[name]
        come[name] += 1


def test_weights_that_need_long_blocks_are_rounded_to_thousandths() -> None:
    mixture = Mixture({"a": 0.123456, "b": 0.876544, "rare": 1e-7}, seed=0)
    assert mixture.counts.tolist() == [123, 877, 1]


def test_one_source_takes_every_place() -> None:
    assert Mixture({"a": 0.7}, seed=0).place(3, 12345) == ("a", 12345)


def test_no_weight_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="every source has weight 0"):
        Mixture({"a": 0.0}, seed=0)
