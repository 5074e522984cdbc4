"""Which samples a gallery shows: the first ones or a seeded draw over all units, and some drops of every reason.

How many there are of each is known from the stats files, so only the units that hold something chosen are read.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from random import Random

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.errors import UserError
from data_pipeline.record import Drop, Sample
from data_pipeline.shards.metadata_table import DROPPED
from data_pipeline.shards.reader import FinishedShard, read_shard, read_stats
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.shards.storage import LocalStorage, split_address

DROPS_PER_REASON = 6
DROP_COLUMNS = ("key", "status", "reason", "detail", "url", "sha256", "alt_text")


@dataclass(frozen=True)
class UnitCounts:
    """How many samples of each kind a finished shard holds."""

    shard: FinishedShard
    kept: int
    dropped: Mapping[str, int]  # by reason


def count_samples(shards: Sequence[FinishedShard]) -> list[UnitCounts]:
    """What the stats files say, without the rest of them: there may be many.

    Raises:
        UserError: a stats file is damaged.
    """
    return [UnitCounts(shard, stats.kept, stats.dropped) for shard in shards for stats in [read_stats(shard)]]


def chosen_samples(units: Sequence[UnitCounts], limit: int, seed: int | None) -> Iterator[Sample]:
    """At most `limit` samples in the order of the dataset.

    Args:
        seed: of a draw over all of them, each as likely as the other; None: the first.
    """
    chosen = choose(sum(unit.kept for unit in units), limit, seed)
    local = all(isinstance(split_address(unit.shard.tar)[0], LocalStorage) for unit in units)
    start = 0
    for unit in units:
        places = [place - start for place in chosen if start <= place < start + unit.kept]
        start += unit.kept
        if places and local:
            index = ShardIndex([unit.shard])
            yield from (index[place] for place in places)
        elif places:  # an object store: read in order up to the last one
            wanted = set(places)
            samples = enumerate(islice(read_shard(unit.shard.tar), places[-1] + 1))
            yield from (sample for place, sample in samples if place in wanted)


def choose(count: int, limit: int, seed: int | None) -> list[int]:
    """Places of at most `limit` things among `count`, rising."""
    if seed is None or count <= limit:
        return list(range(min(count, limit)))
    return sorted(Random(seed).sample(range(count), limit))


@dataclass(frozen=True)
class Dropped:
    """Drops of one reason."""

    reason: str
    count: int  # of all units
    shown: tuple[Drop, ...]


def chosen_drops(units: Sequence[UnitCounts], seed: int | None) -> list[Dropped]:
    """Some drops of every reason, the commonest reason first; chosen as `chosen_samples`."""
    counts: Counter[str] = Counter()
    for unit in units:
        counts.update(unit.dropped)
    places = {reason: choose(count, DROPS_PER_REASON, seed) for reason, count in counts.items()}
    shown: dict[str, list[Drop]] = {reason: [] for reason in counts}
    starts: Counter[str] = Counter()
    for unit in units:
        wanted = {
            reason: [place - starts[reason] for place in places[reason] if 0 <= place - starts[reason] < count]
            for reason, count in unit.dropped.items()
        }
        starts.update(unit.dropped)
        if any(wanted.values()):
            drops = _read_drops(unit.shard.parquet)
            for reason, found in wanted.items():
                of_reason = [drop for drop in drops if drop.reason == reason]
                if len(of_reason) != unit.dropped[reason]:
                    raise UserError(
                        f"{unit.shard.parquet}: {len(of_reason)} drops for {reason}, its stats file says "
                        f"{unit.dropped[reason]}; run data verify on its folder"
                    )
                shown[reason] += [of_reason[place] for place in found]
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [Dropped(reason, count, tuple(shown[reason])) for reason, count in ranked]


def _read_drops(parquet: str | os.PathLike[str]) -> list[Drop]:
    storage, name = split_address(parquet)
    try:
        with storage.open(name) as file:
            table = pq.ParquetFile(file).read(columns=list(DROP_COLUMNS), use_threads=False)
            rows = table.filter(pc.equal(table["status"], DROPPED)).drop_columns("status").to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        problem = " ".join(str(error).split())[:160]
        raise UserError(
            f"{parquet}: not the table of a finished shard ({problem}); run data verify on its folder"
        ) from error
    return [Drop(**row) for row in rows]
