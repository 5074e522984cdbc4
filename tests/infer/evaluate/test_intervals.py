"""Statistics over subjects: means within a group first, intervals by resampling groups, differences on equal cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pandas import DataFrame
from scipy import stats

from infer.evaluate.intervals import compare, estimate_column, estimate_mean, group_means, win_share


def table(**groups: list[float]) -> DataFrame:
    """One row a number, cases counted within groups."""
    rows = [(g, f"{g}--{i}", v) for g, values in groups.items() for i, v in enumerate(values)]
    return DataFrame(rows, columns=["group", "case", "score"])


def test_a_group_counts_once_however_many_pictures_it_has() -> None:
    scores = table(cat=[0.0, 1.0, 1.0, 0.0], dog=[1.0])
    assert group_means(scores, "score").to_dict() == {"cat": 0.5, "dog": 1.0}
    assert estimate_column(scores, "score").mean == 0.75  # over pictures it would be 0.6


def test_a_picture_without_a_number_is_left_out_and_so_is_a_group_without_any() -> None:
    assert group_means(table(cat=[0.25, math.nan], dog=[math.nan]), "score").to_dict() == {"cat": 0.25}


def test_the_interval_is_the_percentile_bootstrap_over_groups() -> None:
    values = np.random.default_rng(1).normal(0.6, 0.1, 30)
    ours = estimate_mean(values)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert ours.mean == pytest.approx(values.mean()) and ours.groups == 30


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    found = [estimate_mean(random.normal(0.0, 1.0, 40), draws=500) for _ in range(200)]
    assert 0.88 <= np.mean([one.low <= 0 <= one.high for one in found]) <= 0.99


def test_the_interval_of_a_constant_is_that_constant() -> None:
    found = estimate_mean(np.full(7, 0.3))
    assert (found.mean, found.low, found.high) == pytest.approx((0.3, 0.3, 0.3)) and found.half_width < 1e-12


def test_the_same_numbers_give_the_same_interval() -> None:
    values = np.array([0.1, 0.5, 0.4, 0.9])
    assert estimate_mean(values) == estimate_mean(values)


def test_one_group_has_no_interval_and_no_group_has_no_mean() -> None:
    one, none = estimate_mean(np.array([0.4])), estimate_mean(np.array([]))
    assert (one.mean, one.groups, one.known) == (0.4, 1, True) and math.isnan(one.half_width)
    assert one.ends == (0.4, 0.4)
    assert not none.known and math.isnan(none.mean)


def test_differences_are_taken_group_by_group() -> None:
    first = table(cat=[0.9, 0.7], dog=[0.5, 0.5], cow=[0.2, 0.2])
    second = table(cat=[0.5, 0.5], dog=[0.5, 0.5], cow=[0.3, 0.3])
    found = compare(first, second, "score")
    assert found.difference.mean == pytest.approx((0.3 + 0.0 - 0.1) / 3)
    assert found.win_share == pytest.approx(0.5)  # won, tied, lost
    assert (found.difference.groups, found.left_out) == (3, 0) and not found.clear


def test_where_lower_is_better_the_lower_one_wins() -> None:
    found = compare(table(cat=[0.1], dog=[0.2]), table(cat=[0.3], dog=[0.9]), "score", better="lower")
    assert found.win_share == 1.0 and found.difference.mean == pytest.approx(-0.45)
    assert found.clear
    assert win_share(np.array([1.0, 1.0, -1.0, 0.0]), better="lower") == pytest.approx(0.375)


def test_a_group_with_a_hole_in_either_is_left_out_and_counted() -> None:
    first = table(cat=[0.9, 0.7], dog=[0.8, math.nan], cow=[1.0, 1.0])
    second = table(cat=[0.5, 0.5], dog=[0.1, 0.1])  # nothing of the cow, half of the dog lost above
    found = compare(first, second, "score")
    assert found.difference.mean == pytest.approx((0.4 + 0.2) / 2)
    assert (found.difference.groups, found.left_out) == (1, 2)


def test_a_case_that_neither_has_a_number_for_is_no_hole() -> None:
    found = compare(table(cat=[0.9, math.nan]), table(cat=[0.5, math.nan]), "score")
    assert found.left_out == 0 and found.difference.mean == pytest.approx(0.4)


def test_nothing_in_common_is_no_comparison() -> None:
    found = compare(table(cat=[0.9]), table(dog=[0.5]), "score")
    assert found.left_out == 2 and not found.difference.known and math.isnan(found.win_share)
