"""Streaming histograms: exact counts, whatever the range and however the stream is cut."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.people.histogram import MOST_BINS, Bar, Histogram


def filled(values: list[float], step: float, **options: object) -> Histogram:
    found = Histogram(step, **options)  # type: ignore[arg-type]
    found.add(np.array(values))
    return found


def test_numbers_fall_into_the_bins_that_they_start() -> None:
    found = filled([0.0, 0.05, 0.1, 0.3, 0.3, 0.39], 0.1)  # 0.3 / 0.1 is a little less than 3
    assert [bar.count for bar in found.bars()] == [2, 1, 0, 3]
    assert found.bars()[3].low == pytest.approx(0.3) and found.bars()[3].high == pytest.approx(0.4)


def test_mean_and_ends_are_exact_and_quantiles_right_to_a_bin() -> None:
    values = np.random.default_rng(0).random(10_000)
    found = filled(list(values), 0.005, top=1.0)
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == (values.min(), values.max())
    for share in (0.05, 0.5, 0.95):
        assert found.quantile(share) == pytest.approx(np.quantile(values, share), abs=0.005)


def test_quantiles_of_whole_numbers_are_whole() -> None:
    found = filled([1, 2, 2, 3, 9], 1, whole=True)
    assert [found.quantile(share) for share in (0.2, 0.5, 1.0)] == [1.0, 2.0, 9.0]


def test_a_natural_top_belongs_to_the_last_bin_and_more_than_it_does_not() -> None:
    assert [bar.count for bar in filled([0.95, 1.0], 0.1, top=1.0).bars()] == [2]
    assert [bar.count for bar in filled([0.95, 1.0, 1.05], 0.1, top=1.0).bars()] == [2, 1]


def test_a_stream_gives_the_same_however_it_is_cut_and_ordered() -> None:
    values = np.random.default_rng(1).lognormal(3, 3, 5000) * np.where(np.arange(5000) % 2, 1, -1)
    whole, parts, backwards = Histogram(1e-3), Histogram(1e-3), Histogram(1e-3)
    whole.add(values)
    for part in np.array_split(values, 77):
        parts.add(part)
    for part in np.array_split(values[::-1], 5):
        backwards.add(part)
    assert whole.bars() == parts.bars() == backwards.bars()
    assert sum(bar.count for bar in whole.bars()) == 5000
    assert whole.step == parts.step == backwards.step


def test_memory_stays_bounded_and_wild_numbers_break_nothing() -> None:
    found = filled([1e-9, 1.0, -1e30, 1e300, float("nan"), float("inf")], 2.0**-20)
    assert found.count == 4 and len(found._counts) <= MOST_BINS
    assert sum(bar.count for bar in found.bars()) == 4


def test_bars_are_few_and_of_round_width() -> None:
    found = filled(list(range(0, 1000)), 8)
    bars = found.bars(most=40)
    assert len(bars) <= 40 and {bar.high - bar.low for bar in bars} == {40.0}
    assert sum(bar.count for bar in bars) == 1000


def test_a_few_wild_numbers_are_folded_into_the_last_bar_only_when_asked() -> None:
    values = [float(i % 10) for i in range(1000)] + [900.0]
    assert filled(values, 1, whole=True).bars(beyond=0.005) == [
        Bar(i, i + 1, 101 if i == 9 else 100) for i in range(10)
    ]
    assert len(filled(values, 1, whole=True).bars()) > 10


def test_nothing_counted_gives_no_bars() -> None:
    assert Histogram(1).bars() == [] and np.isnan(Histogram(1).quantile(0.5)) and np.isnan(Histogram(1).mean)
