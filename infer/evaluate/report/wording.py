"""How numbers are written for people, the same in every table, plot and sentence; a missing one is a dash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

from infer.evaluate.intervals import Estimate

NONE = "—"
ARROWS = {"higher": "↑", "lower": "↓", "": ""}


def score(value: float) -> str:
    """Three decimals, as papers of the field write them; large numbers have fewer."""
    if not isfinite(value):
        return NONE
    decimals = 3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:,.{decimals}f}".replace("-", "−")


def drift(value: float) -> str:
    """A KID, which is small."""
    return f"{value:.4f}".replace("-", "−") if isfinite(value) else NONE


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{'+' if value > 0 else ''}{score(value)}" if isfinite(value) else NONE


def spread(estimate: Estimate) -> str:
    """± half of the interval; empty where there is no interval."""
    return f"± {score(estimate.half_width)}" if isfinite(estimate.low) else ""


def with_spread(estimate: Estimate) -> str:
    """Mean ± half of the interval."""
    return f"{score(estimate.mean)} {spread(estimate)}".strip()


def interval(estimate: Estimate) -> str:
    """Both ends in words, for tooltips."""
    if not estimate.known:
        return "no number"
    groups = count(estimate.groups, "group")
    if not isfinite(estimate.low):
        return f"{groups}: no interval"
    return f"{score(estimate.low)} to {score(estimate.high)}, {groups}"


def seconds(value: float) -> str:
    """`0.4 s`, `12 s`, `3 min`, `1.5 h`; nothing measurable is `0 s`."""
    if not isfinite(value):
        return NONE
    if value < 0.0005:
        return "0 s"
    for size, unit in ((3600, "h"), (60, "min")):
        if value >= 2 * size:
            return f"{_short(value / size)} {unit}"
    return f"{_short(value)} s" if value >= 0.1 else f"{_short(value * 1000)} ms"


def size(value: float) -> str:
    """Bytes in decimal units."""
    if not isfinite(value):
        return NONE
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{_short(value)} {unit}"
        value /= 1000
    return f"{_short(value)} GB"


def share(value: float) -> str:
    return f"{100 * value:.0f} %" if isfinite(value) else NONE


def count(number: int, thing: str) -> str:
    """`1 picture`, `1,200 pictures`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def value_word(value: Any) -> str:
    """A swept value or a setting in a few characters."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def runs(names: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Equal neighbours with their number: `a a b` gives (a, 2), (b, 1)."""
    start = 0
    for i in range(1, len(names) + 1):
        if i == len(names) or names[i] != names[start]:
            yield names[start], i - start
            start = i


def _short(value: float) -> str:
    """Two digits that count."""
    if value >= 99.5:
        return f"{value:,.0f}"
    return f"{value:.2g}" if value else "0"
