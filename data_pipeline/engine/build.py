"""One build from settings to finished shards: what is there is skipped, what is missing is made, the pages come last.

The order of a build: settings against the output -> fetch what must be fetched -> copies -> units -> pages.
A killed build that is started again goes on; the finished set is the same to the last byte.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from data_pipeline.build_settings import DataSettings
from data_pipeline.engine.copies import find_copies
from data_pipeline.engine.output import Output
from data_pipeline.engine.redo import FinishedShards
from data_pipeline.errors import UserError
from data_pipeline.shards.shard_stats import ShardStats
from data_pipeline.sources import Source, Unit


@dataclass
class Totals:
    """What a build did."""

    shards: int = 0
    read: int = 0
    kept: int = 0
    entities: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0

    def add(self, stats: ShardStats) -> None:
        self.shards += 1
        self.read += stats.read
        self.kept += stats.kept
        self.entities += stats.entities
        self.dropped.update(stats.dropped)

    def line(self) -> str:
        """One line for a person."""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.dropped.most_common())
        speed = f", {self.read / self.seconds:.1f} pictures/s" if self.seconds else ""
        return (
            f"{self.shards:,} shards: {self.kept:,} of {self.read:,} pictures kept with {self.entities:,} entities"
            f"{speed}" + (f"; dropped: {reasons}" if reasons else "")
        )


def build(settings: DataSettings, redo: str | None = None) -> Totals:
    """Build the dataset, or run one stage of a built one again.

    Raises:
        UserError: settings that do not fit the output, a model or source that cannot be read, a full disk.
    """
    output = Output(settings, redo)
    with output.locked():
        output.begin()
        source = _source(output, redo)
        units = _own(source.units(), settings)
        if not units:
            raise UserError(
                f"source.kind={settings.source.kind}: nothing there for engine.slice={settings.engine.slice}"
            )
        todo = output.todo(units)
        if todo and settings.duplicates.remove and not isinstance(source, FinishedShards):
            find_copies(output, source, units)
        totals = _run(output, units, todo, redo)
        output.end()
        print(f"{settings.output}: {totals.line() if todo else 'nothing left to do'}")
        _write_pages(output)
    return totals


def _source(output: Output, redo: str | None) -> Source | FinishedShards:
    if redo:
        return FinishedShards(output, redo)
    source = output.settings.source.open()
    fetch = getattr(source, "fetch", None)
    if fetch is not None:
        with tqdm(desc="downloading", unit=" pictures") as bar:
            fetch(lambda tried, kept: bar.update(tried - bar.n))
    return source


def _own(units: Sequence[Unit], settings: DataSettings) -> list[Unit]:
    number, count = settings.engine.slice_of
    return list(units[number::count])


def _run(output: Output, units: Sequence[Unit], todo: list[Unit], redo: str | None) -> Totals:
    settings, totals, start = output.settings, Totals(), time.monotonic()
    if not todo:
        return totals
    counts = [unit.count for unit in todo]
    known = [count for count in counts if count is not None]
    total = sum(known) if len(known) == len(counts) else None
    print(f"{settings.output}: {len(todo)} of {len(units)} shards to build")
    with tqdm(total=total, unit=" pictures", smoothing=0.1, dynamic_ncols=True) as bar:
        for name, stats in _engine(settings, redo, todo):
            totals.add(stats)
            bar.update(stats.read)
            bar.set_postfix_str(f"{name}, kept {totals.kept:,}, dropped {totals.read - totals.kept:,}")
    totals.seconds = time.monotonic() - start
    return totals


def _engine(settings: DataSettings, redo: str | None, todo: Sequence[Unit]) -> Iterator[tuple[str, Any]]:
    if settings.engine.kind == "ray":
        from data_pipeline.engine import ray_cluster

        return ray_cluster.run_units(settings, redo, todo)
    from data_pipeline.engine import local

    return local.run_units(settings, redo, todo)


def _write_pages(output: Output) -> None:
    """The pages for people; a slice leaves them to `data pages`, which is called when all are done."""
    settings = output.settings
    if not settings.gallery or settings.engine.slice_of[1] > 1:
        return
    from data_pipeline.people.gallery import write_gallery
    from data_pipeline.people.statistics_page import write_statistics

    for page in (write_statistics(settings.output), write_gallery(settings.output, limit=settings.gallery, seed=None)):
        print(page)


def dry_run(settings: DataSettings) -> str:
    """What a build would take: shards, bytes, hours, money. No model is loaded, no picture fetched, nothing built."""
    from data_pipeline.engine.costs import estimate

    output = Output(settings)
    source = settings.source.open()
    units = _own(source.units(), settings)
    todo = output.todo(units)
    if not todo:
        return f"{settings.output}: all {len(units)} shards are built"
    counted: Mapping[bool, int] = Counter(unit.count is None for unit in todo)
    pictures = sum(unit.count or 0 for unit in todo)
    lines = [f"{settings.output}: {len(todo)} of {len(units)} shards to build, {pictures:,} pictures"]
    if counted.get(True):
        lines.append(f"{counted[True]} shards do not say how many pictures they hold: not in the estimate")
    return "\n".join([*lines, *estimate(settings, pictures)])
