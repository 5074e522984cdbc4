"""Reads shards back: in order (`read_shard`), pixels and masks when they are wanted (`decode_sample`).

Nothing is unpacked to disk: members are read from the stream, their names checked against the few that a sample has.
A tar that is not as the writer makes it ends with one line that names file and member. Shards made elsewhere may order
the members of one key as they like.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.images import decode_reference, decode_stored
from data_pipeline.record import Drop, Sample
from data_pipeline.shards.masks import decode_mask
from data_pipeline.shards.record_json import KEY_PATTERN, record_from_json
from data_pipeline.shards.shard_stats import ShardStats, stats_from_json
from data_pipeline.shards.storage import read_bytes, split_address, storage_of, told_in_one_line
from data_pipeline.shards.tar_members import Member, read_members

STATS_SUFFIX = "_stats.json"
_MEMBER = re.compile(rf"({KEY_PATTERN})\.(jpg|txt|json|ref(?:0|[1-9][0-9]{{0,2}})\.png)")


@dataclass(frozen=True)
class FinishedShard:
    """Addresses of a finished shard's files: paths, or URLs if the folder was one."""

    name: str
    tar: str
    parquet: str
    stats: str


@dataclass(frozen=True)
class DecodedSample:
    """Pixels of a sample."""

    pixels: np.ndarray  # (H, W, 3) uint8 RGB
    masks: np.ndarray  # (N, H, W) bool, one an entity
    references: Mapping[str, np.ndarray]  # member name -> (h, w, 4) uint8 RGBA


def list_shards(folder: str | os.PathLike[str]) -> list[FinishedShard]:
    """The finished shards of a folder, by name. A shard without its stats file is not one.

    Raises:
        UserError: the folder cannot be read.
    """
    storage = storage_of(folder)
    with told_in_one_line(os.fspath(folder), "read"):
        names = storage.names()
    finished = [name.removesuffix(STATS_SUFFIX) for name in names if name.endswith(STATS_SUFFIX)]
    return [
        FinishedShard(name, *(storage.address(name + suffix) for suffix in (".tar", ".parquet", STATS_SUFFIX)))
        for name in sorted(finished)
    ]


def read_stats(shard: FinishedShard) -> ShardStats:
    """What the shard says of itself.

    Raises:
        UserError: the file cannot be read or is damaged.
    """
    return stats_from_json(read_bytes(*split_address(shard.stats)), shard.stats)


def read_shard(path: str | os.PathLike[str]) -> Iterator[Sample]:
    """Samples of a tar in order, one in memory.

    Raises:
        UserError: it cannot be read, or something in it is not as it should be.
    """
    storage, name = split_address(path)
    where = os.fspath(path)
    with told_in_one_line(where, "read"), storage.open(name) as stream:
        yield from samples_of(read_members(stream, where), where)


def read_drops(folder: str | os.PathLike[str], name: str) -> Iterator[Drop]:
    """What was left out of a finished shard, in order.

    Raises:
        UserError: its table cannot be read.
    """
    from data_pipeline.shards.metadata_table import DROPPED, table_rows

    storage, table = storage_of(folder), f"{name}.parquet"
    where = storage.address(table)
    with told_in_one_line(where, "read"), storage.open(table) as file:
        try:
            for row in table_rows(file):
                if row["status"] == DROPPED:
                    yield Drop(**{field.name: row[field.name] for field in fields(Drop)})
        except ValueError as error:
            raise UserError(f"{where}: cannot be read as a table ({error}); build this shard again") from error


def samples_of(members: Iterable[Member], where: str) -> Iterator[Sample]:
    """Put the members of each key together."""
    finished: set[str] = set()
    key: str | None = None
    parts: dict[str, bytes] = {}
    for member in members:
        match = _MEMBER.fullmatch(member.name)
        if not match:
            raise UserError(f"{where}: member {member.name!r:.200}: expected KEY.jpg, .txt, .json or .refN.png")
        if match[1] != key:
            if key is not None:
                yield _sample(key, parts, where)
                finished.add(key)
            key, parts = match[1], {}
            if key in finished:
                raise UserError(
                    f"{where}: member {member.name!r}: its sample ended before; members of a key stand together"
                )
        if match[2] in parts:
            raise UserError(f"{where}: member {member.name!r} stands there twice")
        assert member.data is not None
        parts[match[2]] = member.data
    if key is not None:
        yield _sample(key, parts, where)


def decode_sample(sample: Sample, where: str = "") -> DecodedSample:
    """Pixels, masks and reference pictures of a sample.

    Raises:
        UserError: a picture cannot be decoded or has not the size that the record names.
    """
    record = sample.record
    prefix = f"{where}: " if where else ""
    pixels = decode_stored(sample.jpeg, f"{prefix}{record.key}.jpg")
    if pixels.shape[:2] != (record.height, record.width):
        found = f"{pixels.shape[1]} x {pixels.shape[0]}"
        raise UserError(f"{prefix}{record.key}.jpg: {found} pixels; the record says {record.width} x {record.height}")
    masks = np.zeros((len(record.entities), record.height, record.width), dtype=bool)
    for number, entity in enumerate(record.entities):
        masks[number] = decode_mask(entity.mask)
    references = {name: decode_reference(data, f"{prefix}{name}") for name, data in sample.references.items()}
    return DecodedSample(pixels, masks, references)


def _sample(key: str, parts: Mapping[str, bytes], where: str) -> Sample:
    for part in ("jpg", "txt", "json"):
        if part not in parts:
            raise UserError(f"{where}: {key}.{part} is missing")
    member = f"{where}: {key}.json"
    record = record_from_json(parts["json"], member)
    if record.key != key:
        raise UserError(f"{member}: key={record.key!r}: expected the member's, {key!r}")
    if parts["txt"] != record.caption.encode():
        raise UserError(f"{where}: {key}.txt: not the caption of {key}.json")
    references = {f"{key}.{part}": data for part, data in parts.items() if part.startswith("ref")}
    named = {name for entity in record.entities for name in entity.references}
    if named - set(references):
        raise UserError(f"{member}: references: {sorted(named - set(references))[0]} is no member")
    if set(references) - named:
        raise UserError(f"{where}: {sorted(set(references) - named)[0]}: no entity names it")
    return Sample(record, parts["jpg"], references)
