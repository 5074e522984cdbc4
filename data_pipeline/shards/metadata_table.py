"""`NAME.parquet`: one row a sample, kept or dropped, in the order of the source; what statistics and searches read.

The same samples give the same bytes. Rows wait in memory until a row group is full: 512 rows or 4 MB of text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from io import RawIOBase
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.record import Drop, Sample
from data_pipeline.shards.record_json import entities_to_json, plain_json, plain_text

GROUP_ROWS = 512
GROUP_CHARACTERS = 4_000_000

KEPT, DROPPED = "kept", "dropped"

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("status", pa.string(), nullable=False),  # kept, dropped
        pa.field("reason", pa.string(), nullable=False),  # of the drop; "" when kept
        pa.field("detail", pa.string(), nullable=False),
        pa.field("url", pa.string()),
        pa.field("sha256", pa.string(), nullable=False),  # of the source's bytes; "" when they were never there
        pa.field("alt_text", pa.string(), nullable=False),
        pa.field("caption", pa.string()),  # from here on null when dropped
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("num_entities", pa.int32()),
        pa.field("entities", pa.string()),  # JSON as in the record
        pa.field("source_scores", pa.string()),  # JSON
        pa.field("provenance", pa.string()),  # JSON
    ]
)


def table_row(item: Sample | Drop) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any]
    if isinstance(item, Drop):
        row = {"key": item.key, "status": DROPPED, "reason": item.reason, "detail": item.detail}
        row |= {"url": item.url, "sha256": item.sha256, "alt_text": item.alt_text}
    else:
        record = item.record
        row = {"key": record.key, "status": KEPT, "reason": "", "detail": "", "caption": record.caption}
        row |= {"url": record.url, "sha256": record.sha256, "alt_text": record.alt_text}
        row |= {"width": record.width, "height": record.height, "num_entities": len(record.entities)}
        row["entities"] = entities_to_json(record)
        row["source_scores"] = plain_json(dict(record.source_scores))
        row["provenance"] = plain_json({stage: asdict(who) for stage, who in record.provenance.items()})
    return {
        name: plain_text(value) if isinstance(value, str) else value
        for name, value in ((name, row.get(name)) for name in SCHEMA.names)
    }


class TableWriter:
    """Writes rows to an open file as they come."""

    def __init__(self, file: BinaryIO | RawIOBase) -> None:
        self._writer = pq.ParquetWriter(file, SCHEMA, compression="zstd")
        self._rows: list[Mapping[str, Any]] = []
        self._characters = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self._rows.append(row)
        self._characters += sum(len(value) for value in row.values() if isinstance(value, str))
        if len(self._rows) >= GROUP_ROWS or self._characters >= GROUP_CHARACTERS:
            self._flush()

    def close(self) -> None:
        """Write what waits, and the end of the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=SCHEMA))
        self._rows, self._characters = [], 0


def table_rows(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Rows of an open table in order, one row group in memory.

    Raises:
        ValueError: it is not a table of this program.
    """
    try:
        table = pq.ParquetFile(file)
        if not table.schema_arrow.equals(SCHEMA):
            raise ValueError(f"columns {', '.join(table.schema_arrow.names)[:200]}; expected {', '.join(SCHEMA.names)}")
        for batch in table.iter_batches(batch_size=GROUP_ROWS):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error
