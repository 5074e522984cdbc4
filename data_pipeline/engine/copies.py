"""Later copies of a picture, found over the whole source before any model looks at it.

Each unit is hashed once (`duplicates/NAME.parquet` in the output); when all are there, it is written down for each unit
what in it is a copy of what (`duplicates/NAME.json`), and workers leave these out. Slices hash their own units and wait
for the others. The answer depends on the order of the source only.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from data_pipeline.duplicates import DuplicateIndex, PictureHash
from data_pipeline.engine.decoding import Decoders, Refusal, hashes
from data_pipeline.engine.output import Output, write_bytes
from data_pipeline.shards.storage import Storage, clean_leftovers, read_bytes, storage_of
from data_pipeline.sources import Source, SourceSample, Unit

PATIENCE_S = 5.0  # between two looks for the hashes of other slices


@dataclass(frozen=True)
class CopyOf:
    """What a later copy is a copy of."""

    reason: str  # duplicate, near_duplicate
    of: str  # key of the earlier picture
    sha256: str


def find_copies(output: Output, source: Source, own: Sequence[Unit]) -> None:
    """Write down the copies in `own` units, hashing what has not been hashed before."""
    storage = _storage(output)
    clean_leftovers(_folder(output))
    there = set(storage.names())
    if all(f"{unit.name}.json" in there for unit in own):
        return
    missing = [unit for unit in own if f"{unit.name}.parquet" not in there]
    if missing:
        with Decoders(output.settings) as decoders:
            for unit in tqdm(missing, desc="looking for copies", unit=" shards"):
                _write_hashes(storage, unit.name, list(_hashes(decoders, source, unit)))
    units = source.units()
    _wait_for_others(storage, units)
    index = DuplicateIndex([unit.name for unit in units], output.settings.duplicates.max_distance)
    sha256 = dict[tuple[str, str], str]()
    names = {unit.name for unit in own}
    for unit in units:
        pictures = _read_hashes(storage, unit.name)
        index.add(unit.name, pictures)
        if unit.name in names:
            sha256.update({(unit.name, picture.key): picture.sha256 for picture in pictures})
    for unit in own:
        found = {
            copy.key: (
                "duplicate" if copy.same_bytes else "near_duplicate",
                copy.of_key,
                sha256[unit.name, copy.key],
            )
            for copy in index.copies(unit.name)
        }
        write_bytes(storage, f"{unit.name}.json", (json.dumps(found, sort_keys=True, indent=1) + "\n").encode())


def unit_copies(output: Output, name: str) -> dict[str, CopyOf]:
    """The copies in a unit by key; none if nobody looked for them."""
    storage = _storage(output)
    try:
        with storage.open(f"{name}.json") as file:
            found = json.loads(file.read())
    except FileNotFoundError:
        return {}
    return {key: CopyOf(*values) for key, values in found.items()}


def _folder(output: Output) -> str:
    return f"{output.folder}/duplicates"


def _storage(output: Output) -> Storage:
    return storage_of(_folder(output))


def _hashes(decoders: Decoders, source: Source, unit: Unit) -> Iterator[PictureHash]:
    samples = ((s, s.image) if isinstance(s, SourceSample) else (s, None) for s in source.samples(unit))
    for position, (sample, answer) in enumerate(decoders.ordered(samples, hashes)):
        if answer is not None and not isinstance(answer, Refusal):
            yield PictureHash(position, sample.key, *answer)


def _write_hashes(storage: Storage, name: str, pictures: Sequence[PictureHash]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {
            "position": pa.array([p.position for p in pictures], pa.int64()),
            "key": pa.array([p.key for p in pictures], pa.string()),
            "sha256": pa.array([p.sha256 for p in pictures], pa.string()),
            "perceptual_hash": pa.array([p.perceptual_hash for p in pictures], pa.uint64()),
        }
    )
    file = io.BytesIO()
    pq.write_table(table, file)
    write_bytes(storage, f"{name}.parquet", file.getvalue())


def _read_hashes(storage: Storage, name: str) -> list[PictureHash]:
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(read_bytes(storage, f"{name}.parquet"))).to_pylist()
    return [PictureHash(**row) for row in rows]


def _wait_for_others(storage: Storage, units: Sequence[Unit]) -> None:
    told = False
    while missing := {f"{unit.name}.parquet" for unit in units} - set(storage.names()):
        if not told:
            print(f"waiting until the other slices have looked at their pictures: {len(missing)} shards to go")
            told = True
        time.sleep(PATIENCE_S)
