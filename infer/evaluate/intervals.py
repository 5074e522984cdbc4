"""Statistics of a comparison: means over subjects, bootstrap intervals, paired differences.

The subject (group) is the unit that is sampled: its pictures share a reference and are not independent, so scores are
averaged within a group first and groups are drawn with replacement (percentile bootstrap, Efron 1979; over clusters:
Davison and Hinkley, 1997, section 3.8).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, nan

import numpy as np
from numpy.typing import NDArray
from pandas import DataFrame, Series

DRAWS, LEVEL, SEED = 2000, 0.95, 0


@dataclass(frozen=True)
class Estimate:
    """A mean over groups and its interval; NaN where there is none (no group; for the interval: only one)."""

    mean: float
    low: float
    high: float
    groups: int

    @property
    def half_width(self) -> float:
        """Half of the interval's length: what stands after ±."""
        return (self.high - self.low) / 2

    @property
    def known(self) -> bool:
        return self.groups > 0

    @property
    def ends(self) -> tuple[float, float]:
        """The interval, or the bare mean twice where there is none: how far a drawing of it reaches."""
        return (self.low, self.high) if isfinite(self.low) else (self.mean, self.mean)


@dataclass(frozen=True)
class Comparison:
    """One method against another on the same cases."""

    difference: Estimate  # first minus second
    win_share: float  # of groups in which the first is the better one, ties count half; NaN without groups
    left_out: int  # groups in which one of the two has no number for some case

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.difference.low > 0 or self.difference.high < 0


def group_means(table: DataFrame, column: str) -> Series:
    """Mean of a column within each group, by group; groups without a number are left out."""
    return table.groupby("group")[column].mean().dropna()


def estimate_mean(values: Series | NDArray[np.float64], draws: int = DRAWS, seed: int = SEED) -> Estimate:
    """Mean of one number a group and its 95 % bootstrap interval.

    Args:
        values: (G,), all finite.
        draws: how often G groups are drawn.
    """
    numbers = np.asarray(values, dtype=float)  # (G,)
    if len(numbers) == 0:
        return Estimate(nan, nan, nan, 0)
    if len(numbers) == 1:
        return Estimate(float(numbers[0]), nan, nan, 1)
    chosen = np.random.default_rng(seed).integers(0, len(numbers), (draws, len(numbers)))
    means = numbers[chosen].mean(axis=1)  # (draws,)
    low, high = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(float(numbers.mean()), float(low), float(high), len(numbers))


def estimate_column(table: DataFrame, column: str) -> Estimate:
    """Mean over groups of the means within groups, with its interval."""
    return estimate_mean(group_means(table, column))


def compare(first: DataFrame, second: DataFrame, column: str, better: str = "higher") -> Comparison:
    """Paired difference of two methods' tables, first minus second.

    Args:
        first: rows of one method, with columns group, case and `column`; `second` likewise.
        better: "lower" turns around who wins; the sign of the difference stays.
    """
    keys = ["group", "case"]
    both = first[[*keys, column]].merge(second[[*keys, column]], on=keys, how="outer", suffixes=("_first", "_second"))
    numbers = both[[f"{column}_first", f"{column}_second"]].astype(float)
    known = numbers.notna()
    there = known.any(axis=1)  # a case that neither has a number for says nothing, and is no hole
    whole = known.all(axis=1)[there].groupby(both["group"][there]).all()
    gap = (numbers.iloc[:, 0] - numbers.iloc[:, 1])[there].groupby(both["group"][there]).mean()[whole]
    return Comparison(estimate_mean(gap), win_share(gap, better), int((~whole).sum()))


def win_share(differences: Series | NDArray[np.float64], better: str = "higher") -> float:
    """Share of groups in which the first of two is the better one; a tie counts half.

    Args:
        differences: (G,) first minus second.
    """
    signs = np.sign(np.asarray(differences, dtype=float)) * (-1 if better == "lower" else 1)
    return float((signs + 1).mean() / 2) if len(signs) else nan
