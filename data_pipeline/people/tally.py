"""Counts over a whole dataset for its statistics page: stats and parquet files in, one `Tally` out, no picture opened.

Totals, drops and nouns are those of the stats files; the tables give what lies between, batch by batch. Memory: one
batch of `ROWS_AT_ONCE` rows and the counts themselves (histograms of fixed size, `MOST_NOUNS` nouns, a line a unit):
150 MB above the imports, whatever the number of rows. A million rows take half a minute of one core.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json
import pyarrow.parquet as pq

from data_pipeline.errors import UserError
from data_pipeline.people.histogram import Histogram
from data_pipeline.shards.metadata_table import KEPT
from data_pipeline.shards.reader import FinishedShard, read_stats
from data_pipeline.shards.shard_stats import ShardStats
from data_pipeline.shards.storage import split_address

ROWS_AT_ONCE = 2048
MOST_NOUNS = 200_000  # that are counted; past them the rarer half is forgotten
MOST_SCORES = 20  # names of source scores that get a histogram
MOST_VALUES = 8  # of one fact that are told apart
COLUMNS = ("status", "caption", "width", "height", "entities", "source_scores", "provenance")

_ENTITY = pa.struct(
    [
        ("box_xyxy_px", pa.list_(pa.float64())),
        ("score", pa.float64()),
        ("mask_area_px", pa.float64()),
    ]
)


@dataclass(frozen=True)
class UnitLine:
    """What became of one unit."""

    name: str
    read: int
    kept: int
    entities: int
    num_bytes: int  # of the tar
    commonest_drop: str  # reason, "" where nothing was dropped


@dataclass
class Tally:
    """Counts over all rows."""

    drops: Counter[str] = field(default_factory=Counter)  # by reason
    kept: int = 0
    entities: int = 0
    nouns: Counter[str] = field(default_factory=Counter)
    nouns_forgotten: int = 0  # the largest count that may be missing of any noun; 0: all are exact
    entities_per_picture: Histogram = field(default_factory=partial(Histogram, 1, whole=True))
    box_share: Histogram = field(default_factory=partial(Histogram, 0.005, 1.0))  # area, of the picture's
    mask_share: Histogram = field(default_factory=partial(Histogram, 0.005, 1.0))  # area, of the box's
    score: Histogram = field(default_factory=partial(Histogram, 0.005, 1.0))  # the detector's
    words: Histogram = field(default_factory=partial(Histogram, 1, whole=True))  # of the caption
    longer_side_px: Histogram = field(default_factory=partial(Histogram, 8))
    log2_aspect: Histogram = field(default_factory=partial(Histogram, 0.05))  # log2 of width / height
    source_scores: dict[str, Histogram] = field(default_factory=dict)
    provenance: dict[str, Counter[str]] = field(default_factory=dict)  # stage -> who -> pictures
    facts: dict[str, Counter[str]] = field(default_factory=dict)  # key of the stats files -> value -> units
    units: list[UnitLine] = field(default_factory=list)

    @property
    def dropped(self) -> int:
        return self.drops.total()

    @property
    def read(self) -> int:
        return self.kept + self.dropped


def count_shards(shards: Sequence[FinishedShard], progress: Callable[[int, int], None] | None = None) -> Tally:
    """Counts over finished shards; `progress` is told (shards read, shards in all) after each.

    Raises:
        UserError: a file is missing, cannot be read, or is not the one its stats were written for.
    """
    tally = Tally()
    for number, shard in enumerate(shards, 1):
        stats = read_stats(shard)
        _add_stats(tally, stats)
        storage, name = split_address(shard.parquet)
        try:
            with storage.open(name) as file:
                kept = _add_table(tally, file)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            problem = " ".join(str(error).split())[:160]
            raise UserError(
                f"{shard.parquet}: not the table of a finished shard ({problem}); run data verify on its folder"
            ) from error
        if kept != stats.kept:
            raise UserError(
                f"{shard.parquet}: {kept} samples kept, its stats file says {stats.kept}; run data verify on its folder"
            )
        if progress:
            progress(number, len(shards))
    return tally


def _add_stats(tally: Tally, unit: ShardStats) -> None:
    tally.kept += unit.kept
    tally.entities += unit.entities
    tally.drops.update(unit.dropped)
    tally.nouns.update(unit.nouns)
    _forget_rare(tally)
    for key, value in unit.facts.items():
        values = tally.facts.setdefault(key, Counter())
        text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)
        values[text if text in values or len(values) < MOST_VALUES else "others"] += 1
    commonest = min(unit.dropped, key=lambda reason: (-unit.dropped[reason], reason), default="")
    tar = unit.files.get(f"{unit.name}.tar")
    tally.units.append(UnitLine(unit.name, unit.read, unit.kept, unit.entities, tar.bytes if tar else 0, commonest))


def _add_table(tally: Tally, file: Any) -> int:
    """Count the rows of an open table; returns how many were kept."""
    kept = 0
    for batch in pq.ParquetFile(file).iter_batches(ROWS_AT_ONCE, columns=list(COLUMNS), use_threads=False):
        rows = batch.filter(pc.equal(batch["status"], KEPT))
        if rows.num_rows:
            _add_kept(tally, rows)
        kept += rows.num_rows
    return kept


def _add_kept(tally: Tally, rows: pa.RecordBatch) -> None:
    width, height = (np.asarray(rows[side].cast(pa.float64())) for side in ("width", "height"))  # (N,) each
    tally.longer_side_px.add(np.maximum(width, height))
    with np.errstate(divide="ignore", invalid="ignore"):
        tally.log2_aspect.add(np.log2(width / height))
    tally.words.add(np.asarray(pc.count_substring_regex(rows["caption"].fill_null(""), r"\S+")))
    for text, number in _distinct(rows["provenance"]):
        for stage, who in json.loads(text or "{}").items():
            tally.provenance.setdefault(stage, Counter())[_who(who)] += number
    scores: dict[str, list[float]] = {}
    for text in rows["source_scores"].to_pylist():
        for name, value in json.loads(text or "{}").items():
            scores.setdefault(name, []).append(value)
    for name, values in scores.items():
        if name in tally.source_scores or len(tally.source_scores) < MOST_SCORES:
            tally.source_scores.setdefault(name, Histogram(2.0**-20)).add(np.array(values))
    _add_entities(tally, rows["entities"], width * height)


def _add_entities(tally: Tally, texts: pa.Array, picture_area: np.ndarray) -> None:
    lists = read_entities(texts)
    per_picture = np.diff(np.asarray(lists.offsets))  # (N,)
    tally.entities_per_picture.add(per_picture)
    found = lists.flatten()  # (E,)
    boxes = np.asarray(found.field("box_xyxy_px").flatten()).reshape(-1, 4)  # (E, 4)
    box_area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    with np.errstate(divide="ignore", invalid="ignore"):
        tally.box_share.add(box_area / np.repeat(picture_area, per_picture))
        tally.mask_share.add(np.asarray(found.field("mask_area_px")) / box_area)
    tally.score.add(np.asarray(found.field("score")))


def read_entities(texts: pa.Array) -> pa.ListArray:
    """The JSON lists of a column of entities as one array of lists of structs; Arrow's reader leaves the masks out."""
    lines = "\n".join('{"e":' + (text or "[]") + "}" for text in texts.to_pylist()).encode()
    table = pyarrow.json.read_json(
        pa.BufferReader(lines),
        pyarrow.json.ReadOptions(use_threads=False, block_size=len(lines) + 1),
        pyarrow.json.ParseOptions(
            explicit_schema=pa.schema([("e", pa.list_(_ENTITY))]), unexpected_field_behavior="ignore"
        ),
    )
    return table["e"].combine_chunks()


def _distinct(column: pa.Array) -> list[tuple[str, int]]:
    return [(found["values"], found["counts"]) for found in pc.value_counts(column).to_pylist()]


def _who(provenance: Mapping[str, Any]) -> str:
    """`blip2 · Salesforce/blip2-opt-2.7b · 51572668`: backend, model and revision, where they are known."""
    return " · ".join(str(provenance[key]) for key in ("backend", "model", "revision") if provenance.get(key))


def _forget_rare(tally: Tally) -> None:
    """Keep the commoner half when there are too many nouns (Misra and Gries; Manku and Motwani: lossy counting)."""
    if len(tally.nouns) <= MOST_NOUNS:
        return
    kept = dict(heapq.nlargest(MOST_NOUNS // 2, tally.nouns.items(), key=lambda item: item[1]))
    tally.nouns_forgotten += max(count for noun, count in tally.nouns.items() if noun not in kept)
    tally.nouns = Counter(kept)
