"""The shards of a source with the number of their samples, from their stats files.

Reading the stats of 80,000 shards takes minutes, over a network more: it is done by many threads and once, and kept in
an index file in `data.scratch` that knows by size, time or tag which stats files are still the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from data_pipeline.errors import UserError
from data_pipeline.shards.reader import STATS_SUFFIX
from data_pipeline.shards.shard_stats import stats_from_json
from train.settings import ShardsSource
from train.stream.shard_places import PipedShards, ShardPlace, StoredShards, retried

THREADS = 32
FEW_SHARDS = 1000  # so many local ones are read every time
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")  # goes into a command


@dataclass(frozen=True)
class ShardEntry:
    """A finished shard."""

    name: str
    samples: int
    bytes: int  # of the tar
    sha256: str

    @property
    def tar(self) -> str:
        return f"{self.name}.tar"


@dataclass(frozen=True)
class ShardList:
    """The finished shards of a source, by name."""

    place: ShardPlace
    entries: list[ShardEntry]

    @property
    def contents(self) -> str:
        """A hash of all that its tars hold."""
        return hashlib.sha256("".join(f"{e.name} {e.sha256}\n" for e in self.entries).encode()).hexdigest()[:16]


def list_shards_of(name: str, source: ShardsSource, scratch: Path) -> ShardList:
    """The shards that section `data.shards.NAME` describes.

    Raises:
        UserError: keys missing or in contradiction, no finished shards, stats that cannot be read.
    """
    place, told = _place(f"data.shards.{name}", source)
    stamps = retried(place.stamps, told)
    stats = {file: stamp for file, stamp in sorted(stamps.items()) if file.endswith(STATS_SUFFIX)}
    if not stats:
        raise UserError(f"{told}: no finished shards (NAME.tar with NAME_stats.json) there; check the address")
    if place.local is not None and len(stats) <= FEW_SHARDS:
        found = _read(place, list(stats), told)
    else:
        found = _indexed(place, stats, told, scratch)
    return ShardList(place, [found[file] for file in stats])


def _place(key: str, source: ShardsSource) -> tuple[ShardPlace, str]:
    """Where the shards lie, and how messages name it."""
    if (source.folder is None) == (source.pipe is None):
        given = "neither" if source.folder is None else "both"
        raise UserError(f"{key}: {given} of folder and pipe given; expected one of them")
    if source.folder is not None:
        if source.names is not None:
            raise UserError(f"{key}.names={source.names}: only with pipe; all finished shards of a folder are read")
        return StoredShards(source.folder), f"{key}.folder={source.folder}"
    assert source.pipe is not None
    if "{file}" not in source.pipe:
        raise UserError(f"{key}.pipe={source.pipe}: expected {{file}} where the name of a shard's file belongs")
    if source.names is None:
        raise UserError(f'{key}.names: missing; with pipe, name the shards, for example "{{00000..00999}}"')
    names = _expanded(f"{key}.names={source.names}", source.names)
    return PipedShards(source.pipe, [f"{name}{STATS_SUFFIX}" for name in names]), f"{key}.pipe={source.pipe}"


def _expanded(told: str, pattern: str) -> list[str]:
    from braceexpand import braceexpand

    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"{told}: {error}") from error
    wrong = next((name for name in names if not _NAME.fullmatch(name)), None)
    if wrong is not None:
        raise UserError(f"{told}: gives {wrong!r:.100}; expected names of letters, digits, _, - or . without .tar")
    if len(set(names)) != len(names):
        raise UserError(f"{told}: names a shard twice")
    return names


def _read(place: ShardPlace, files: list[str], told: str) -> dict[str, ShardEntry]:
    """Stats files, by many threads."""

    def read(file: str) -> ShardEntry:
        address = place.address(file)
        data = retried(lambda: b"".join(place.chunks(file)), address)
        stats = stats_from_json(data, address)
        name = file.removesuffix(STATS_SUFFIX)
        tar = stats.files.get(f"{name}.tar")
        if stats.name != name or tar is None:
            raise UserError(f"{address}: is of shard {stats.name!r:.100}; files of a shard must not be renamed")
        return ShardEntry(name, stats.kept, tar.bytes, tar.sha256)

    with ThreadPoolExecutor(THREADS) as pool:
        entries = pool.map(read, files)
        shown = tqdm(entries, total=len(files), desc=told, unit="stats", disable=len(files) <= FEW_SHARDS)
        try:
            return dict(zip(files, shown, strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _indexed(place: ShardPlace, stats: Mapping[str, str], told: str, scratch: Path) -> dict[str, ShardEntry]:
    """As `_read`, for what the index does not know yet; one process of this machine reads, the others wait for it."""
    where = place.address("")
    index = scratch / f"index-{hashlib.sha256(where.encode()).hexdigest()[:16]}.json"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{index}.lock"):
            known = _read_index(index)
            same = {file: known[file][1] for file, stamp in stats.items() if known.get(file, ("?",))[0] == stamp}
            missing = [file for file in stats if file not in same]
            if not missing:
                return same
            found = same | _read(place, missing, told)
            rows = {file: [stamp, *vars(found[file]).values()] for file, stamp in stats.items()}
            part = index.with_suffix(f".part{os.getpid()}")
            part.write_text(json.dumps({"address": where, "shards": rows}))
            part.replace(index)
            return found
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"data.scratch={scratch}: cannot be written ({reason}); make room there or name another"
        ) from error


def _read_index(index: Path) -> dict[str, tuple[str, ShardEntry]]:
    """By stats file, its stamp then and what it said; nothing where the index is missing or damaged."""
    try:
        rows = json.loads(index.read_text())["shards"]
        return {file: (row[0], ShardEntry(*row[1:])) for file, row in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return {}
