"""How the trainer's benchmarks take time and judge it: contenders in turn, medians, bars with pass or fail."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Bar:
    """What was asked of one figure."""

    what: str
    value: float
    limit: float
    at_least: bool = False  # False: at most

    @property
    def met(self) -> bool:
        value = round(self.value, 3)  # clocks do not tell more
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        sign, verdict = (">=" if self.at_least else "<="), ("met" if self.met else "MISSED")
        return f"bar: {self.what} {sign} {self.limit:g}: {self.value:.3f} ({verdict})"


@dataclass(frozen=True)
class Table:
    """Figures that were measured together, and the bars that stand on them."""

    part: str
    shapes: str  # exactly what was run
    rows: dict[str, dict[str, float]]  # contender -> column -> figure
    bars: tuple[Bar, ...] = ()

    def __str__(self) -> str:
        columns = list(dict.fromkeys(column for row in self.rows.values() for column in row))
        lines = [f"{self.part}: {self.shapes}", " " * 42 + "".join(f"{column:>16}" for column in columns)]
        for name, row in self.rows.items():
            figures = (f"{row[column]:>16.4g}" if column in row else " " * 16 for column in columns)
            lines.append(f"  {name:<40}" + "".join(figures))
        return "\n".join([*lines, *(f"  {bar}" for bar in self.bars)])

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"bars": [asdict(bar) | {"met": bar.met} for bar in self.bars]}


@dataclass(frozen=True)
class Seconds:
    """What one call took. The processor's are not longer for what else the machine does, but waits are not in them."""

    wall: float
    processor: float  # of all threads of this process


def median_seconds(
    works: Mapping[str, Work], rounds: int, device: torch.device, between: Work | None = None
) -> dict[str, Seconds]:
    """Median seconds of one call of each work.

    Args:
        works: what is compared; each is called once before the clock starts.
        rounds: in each every work has its turn, in an order that is reversed from round to round.
        device: waited for before the clock is read.
        between: called after each work, off the clock.
    """
    taken: dict[str, list[Seconds]] = {name: [] for name in works}
    for round_number in range(-1, rounds):
        for name in list(works)[:: 1 if round_number % 2 == 0 else -1]:
            wait_for(device)
            start = Seconds(time.perf_counter(), time.process_time())
            works[name]()
            wait_for(device)
            if round_number >= 0:
                taken[name].append(Seconds(time.perf_counter() - start.wall, time.process_time() - start.processor))
            if between is not None:
                between()
    return {
        name: Seconds(statistics.median(t.wall for t in each), statistics.median(t.processor for t in each))
        for name, each in taken.items()
    }


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
