"""Chooses the rows of a metadata table that are worth a request, before any is made, and writes them as parquet parts.

Parts hold a whole number of shards each (img2dataset numbers shards by position), so row i is picture i of the
download for ever. Read and written in batches: memory is bounded by one part.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.sources.files import Place
from data_pipeline.sources.metadata import SCORE_NAMES, TEXT_NAMES, URL_NAMES

ALIASES = {"url": URL_NAMES, "caption": TEXT_NAMES, "width": ("width",), "height": ("height",), **SCORE_NAMES}
OUTPUT = ("url", "caption", *SCORE_NAMES)  # columns of the parts
BATCH_ROWS = 65_536
PART_ROWS = 1_000_000  # about
DONE = "selection.json"  # written last


@dataclass(frozen=True)
class Filters:
    """Limits of a row; None: not asked. A row that lacks a value that is asked for does not pass."""

    min_longer_side_px: int | None
    max_punsafe: float | None
    max_pwatermark: float | None
    min_aesthetic: float | None
    min_similarity: float | None


@dataclass(frozen=True)
class Selection:
    """What was chosen."""

    rows: int
    left_out: Mapping[str, int]  # rows by the filter that they did not pass first


def select(
    files: Sequence[tuple[Place, str]], columns: Mapping[str, str], filters: Filters, per_shard: int, folder: Path
) -> Selection:
    """Write the rows that pass to `folder`/00000.parquet …; what an earlier call wrote is taken over.

    Args:
        files: parquet files, in the order in which their rows count.
        columns: names of columns by what they hold ("url": "LINK"), where they are not among the usual ones.
        per_shard: pictures of a shard.
    Raises:
        UserError: a file is no parquet or lacks a column that is needed; or `folder` holds another selection.
    """
    identity = _identity(files, columns, filters, per_shard)
    if (folder / DONE).exists():
        done = json.loads((folder / DONE).read_text(encoding="utf-8"))
        if done["identity"] != identity:
            raise UserError(
                f"source.download={folder.parent}: holds pictures of other metadata, filters or shard sizes; give "
                "another folder, or delete this one"
            )
        return Selection(done["rows"], done["left_out"])
    folder.mkdir(parents=True, exist_ok=True)
    for rest in folder.glob("*.parquet"):  # of a call that was stopped
        rest.unlink()
    left_out: Counter[str] = Counter()
    rows = _write(_passing(files, columns, filters, left_out), max(1, PART_ROWS // per_shard) * per_shard, folder)
    counts = dict(sorted(left_out.items()))
    content = {"identity": identity, "rows": rows, "left_out": counts}
    partial = folder / f"{DONE}.partial"
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(partial, folder / DONE)
    return Selection(rows, counts)


def _identity(files: Sequence[tuple[Place, str]], columns: Mapping[str, str], filters: Filters, per_shard: int) -> str:
    """Changes with everything that the selection depends on; files by name and size."""
    listed = [(place.url(path), place.system.size(path)) for place, path in files]
    content = [listed, sorted(columns.items()), vars(filters), per_shard]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _passing(
    files: Sequence[tuple[Place, str]], columns: Mapping[str, str], filters: Filters, left_out: Counter[str]
) -> Iterator[Any]:
    """Tables of the rows that pass, with the columns of `OUTPUT`."""
    import pyarrow
    from pyarrow import parquet

    for place, path in files:
        try:
            with place.system.open(path, "rb") as file, parquet.ParquetFile(file) as table:
                names = _columns_of(table.schema_arrow.names, columns, filters, place.url(path))
                for batch in table.iter_batches(batch_size=BATCH_ROWS, columns=sorted(set(names.values()))):
                    yield _filter(batch, names, filters, left_out)
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(
                f"source.metadata: {place.url(path)}: no parquet file that can be read "
                f"({' '.join(str(error).split())[:160]})"
            ) from error


def _columns_of(present: Sequence[str], given: Mapping[str, str], filters: Filters, file: str) -> dict[str, str]:
    """Name in the file of each thing that it holds."""
    by_lower = {name.lower(): name for name in reversed(present)}
    found: dict[str, str] = {}
    for meaning, aliases in ALIASES.items():
        wanted = (given[meaning],) if meaning in given else aliases
        name = next((by_lower[alias.lower()] for alias in wanted if alias.lower() in by_lower), None)
        if name is not None:
            found[meaning] = name
        elif meaning in _needed(given, filters):
            raise UserError(
                f"source.metadata: {file}: no column {' or '.join(wanted)}; found {', '.join(present)}; name it with "
                f"source.columns.{meaning}=NAME, or switch off what needs it"
            )
    return found


def _needed(given: Mapping[str, str], filters: Filters) -> set[str]:
    limits = {
        "width": filters.min_longer_side_px,
        "height": filters.min_longer_side_px,
        "punsafe": filters.max_punsafe,
        "pwatermark": filters.max_pwatermark,
        "aesthetic": filters.min_aesthetic,
        "similarity": filters.min_similarity,
    }
    return {"url", *given, *(name for name, limit in limits.items() if limit is not None)}


def _filter(batch: Any, names: Mapping[str, str], filters: Filters, left_out: Counter[str]) -> Any:
    import pyarrow
    from pyarrow import compute

    def column(meaning: str, kind: Any) -> Any:
        if meaning not in names:
            return pyarrow.nulls(batch.num_rows, kind)
        return batch.column(batch.schema.get_field_index(names[meaning])).cast(kind, safe=False)

    text, number = pyarrow.string(), pyarrow.float64()
    url = column("url", text)
    scores = {name: column(name, number) for name in SCORE_NAMES}
    tests = {"no_web_address": compute.match_substring_regex(url, r"(?i)^https?://[^/\s]")}
    if filters.min_longer_side_px is not None:
        longer = compute.max_element_wise(column("width", number), column("height", number), skip_nulls=False)
        tests["too_small"] = compute.greater_equal(longer, filters.min_longer_side_px)
    for reason, name, limit, compare in (
        ("punsafe", "punsafe", filters.max_punsafe, compute.less_equal),
        ("pwatermark", "pwatermark", filters.max_pwatermark, compute.less_equal),
        ("aesthetic", "aesthetic", filters.min_aesthetic, compute.greater_equal),
        ("similarity", "similarity", filters.min_similarity, compute.greater_equal),
    ):
        if limit is not None:
            tests[reason] = compare(scores[name], limit)
    passed = pyarrow.array([True] * batch.num_rows)
    for reason, test in tests.items():
        test = compute.fill_null(test, False)
        left_out[reason] += compute.sum(compute.and_(passed, compute.invert(test))).as_py() or 0
        passed = compute.and_(passed, test)
    table = pyarrow.table({"url": url, "caption": column("caption", text), **scores})
    return table.filter(passed)


def _write(tables: Iterator[Any], part_rows: int, folder: Path) -> int:
    """Write tables as parts of `part_rows` rows; returns the number of rows."""
    import pyarrow
    from pyarrow import parquet

    waiting: list[Any] = []
    rows = part = 0
    for table in tables:
        rows += table.num_rows
        waiting.append(table)
        while sum(one.num_rows for one in waiting) >= part_rows:
            whole = pyarrow.concat_tables(waiting)
            parquet.write_table(whole.slice(0, part_rows), folder / f"{part:05d}.parquet")
            waiting, part = [whole.slice(part_rows)], part + 1
    if any(one.num_rows for one in waiting):
        parquet.write_table(pyarrow.concat_tables(waiting), folder / f"{part:05d}.parquet")
    return rows
