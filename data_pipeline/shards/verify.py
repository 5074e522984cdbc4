"""Says whether a folder of shards can be trusted: every byte of the finished ones is read, decoded and compared.

A shard is sound when its stats are as they were written, tar and table have the size and hash that the stats name,
every record is valid, every picture and mask decodes at its size, and the table says of each sample what the tar says.
Over all shards keys are unique and the build's facts the same. Memory: a shard's row group, and 8 bytes a sample.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.record import Sample
from data_pipeline.shards.metadata_table import KEPT, table_row, table_rows
from data_pipeline.shards.reader import FinishedShard, decode_sample, list_shards, read_stats, samples_of
from data_pipeline.shards.shard_stats import FileFacts, ShardStats
from data_pipeline.shards.storage import LocalStorage, leftovers, split_address, storage_of, told_in_one_line
from data_pipeline.shards.tar_members import read_members

AGAIN = "delete its stats file and run the build again"
_PART = re.compile(r"(?P<name>.+)\.(tar|parquet)")


@dataclass(frozen=True)
class ShardFindings:
    """What was found in one shard."""

    shard: FinishedShard
    problems: tuple[str, ...]  # one line each
    kept: int = 0
    dropped: int = 0
    entities: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    key_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))  # (N,) of kept and dropped


@dataclass(frozen=True)
class Report:
    """What was found in a folder."""

    folder: str
    shards: int
    kept: int
    dropped: int
    entities: int
    problems: tuple[str, ...]  # something finished is wrong
    unfinished: tuple[str, ...]  # files of shards without stats: a build stopped, or is running
    leftovers: tuple[str, ...]  # temporary files of dead runs

    @property
    def ok(self) -> bool:
        """Whether everything that is finished is sound. Unfinished shards are no fault: a build goes on there."""
        return self.shards > 0 and not self.problems

    def lines(self) -> list[str]:
        """For a person."""
        total = f"{self.shards} shards, {self.kept} samples, {self.entities} entities, {self.dropped} dropped"
        lines = [f"{self.folder}: {total}"]
        if not self.shards:
            lines.append("no finished shard here (NAME_stats.json); give the output folder of a build, or run one")
        lines += [f"damaged: {problem}" for problem in self.problems]
        lines += [f"unfinished: {name}; the same build command, run again, finishes it" for name in self.unfinished]
        lines += [f"left over: {name}; the next build removes it" for name in self.leftovers]
        if self.ok:
            lines.append("all finished shards are sound")
        return lines


def verify(
    folder: str | os.PathLike[str], *, processes: int = 1, on_shard: Callable[[ShardFindings], None] | None = None
) -> Report:
    """Check every shard of a folder.

    Args:
        processes: shards checked at the same time.
        on_shard: called after each shard, in order: progress.

    Raises:
        UserError: the folder cannot be listed. What is wrong with shards is in the report.
    """
    shards = list_shards(folder)
    findings: list[ShardFindings] = []
    for found in _each(shards, processes):
        findings.append(found)
        if on_shard:
            on_shard(found)
    problems = [problem for found in findings for problem in found.problems]
    problems += _different_facts(findings)
    problems += _repeated_keys(findings)
    storage = storage_of(folder)
    return Report(
        folder=os.fspath(folder),
        shards=len(shards),
        kept=sum(found.kept for found in findings),
        dropped=sum(found.dropped for found in findings),
        entities=sum(found.entities for found in findings),
        problems=tuple(problems),
        unfinished=tuple(_unfinished(storage.names(), {shard.name for shard in shards})),
        leftovers=tuple(str(path) for path in leftovers(storage)) if isinstance(storage, LocalStorage) else (),
    )


def verify_shard(shard: FinishedShard) -> ShardFindings:
    """Check one shard; its problems, each a line, say what to do."""
    try:
        stats = read_stats(shard)
    except UserError as error:
        return ShardFindings(shard, (str(error),))
    check = _ShardCheck(shard, stats)
    problems = []
    for step in (check.files, check.contents):
        try:
            step()
        except UserError as error:
            problems.append(str(error))
            break
    return ShardFindings(
        shard=shard,
        problems=tuple(problems),
        kept=stats.kept,
        dropped=sum(stats.dropped.values()),
        entities=stats.entities,
        facts=stats.facts,
        key_hashes=np.array(check.key_hashes, dtype=np.uint64),
    )


class _ShardCheck:
    """One pass over the bytes for the hashes, one over the contents; the second only if the first found nothing."""

    def __init__(self, shard: FinishedShard, stats: ShardStats) -> None:
        self.shard, self.stats = shard, stats
        self.key_hashes: list[int] = []

    def files(self) -> None:
        """Names, sizes and hashes."""
        names = {f"{self.shard.name}.tar": self.shard.tar, f"{self.shard.name}.parquet": self.shard.parquet}
        if self.stats.name != self.shard.name or set(self.stats.files) != set(names):
            raise UserError(f"{self.shard.stats}: speaks of {self.stats.name}, {sorted(self.stats.files)}; {AGAIN}")
        for name, address in names.items():
            told, found = self.stats.files[name], _file_facts(address)
            if found.bytes != told.bytes:
                raise UserError(f"{address}: {found.bytes} bytes, {told.bytes} were written; {AGAIN}")
            if found.sha256 != told.sha256:
                raise UserError(f"{address}: not the bytes that were written (sha256 differs); {AGAIN}")

    def contents(self) -> None:
        """Records, pictures, masks, and the table beside them; the counts."""
        kept, entities = 0, 0
        nouns: Counter[str] = Counter()
        dropped: Counter[str] = Counter()
        with _opened(self.shard.tar) as tar, _opened(self.shard.parquet) as table:
            samples = samples_of(read_members(tar, self.shard.tar), self.shard.tar)
            for row in self._rows(table):
                self.key_hashes.append(_key_hash(row["key"]))
                if row["status"] != KEPT:
                    dropped[row["reason"]] += 1
                    continue
                sample = self._sample(samples, row)
                kept += 1
                entities += len(sample.record.entities)
                nouns.update(entity.noun for entity in sample.record.entities)
            extra = next(samples, None)
            if extra is not None:
                raise UserError(f"{self.shard.tar}: {extra.record.key} is not in {self.shard.parquet}; {AGAIN}")
        found = (len(self.key_hashes), kept, dict(dropped), entities, dict(nouns))
        stats = self.stats
        told = (stats.read, stats.kept, dict(stats.dropped), stats.entities, dict(stats.nouns))
        for name, a, b in zip(("read", "kept", "dropped", "entities", "nouns"), told, found, strict=True):
            if a != b:
                raise UserError(f"{self.shard.stats}: {name}: {a!r:.80}, but {b!r:.80} in the files; {AGAIN}")

    def _rows(self, table: BinaryIO) -> Iterator[dict[str, Any]]:
        try:
            yield from table_rows(table)
        except ValueError as error:
            raise UserError(f"{self.shard.parquet}: cannot be read as a table ({error}); {AGAIN}") from error

    def _sample(self, samples: Iterator[Sample], row: Mapping[str, Any]) -> Sample:
        sample = next(samples, None)
        if sample is None:
            raise UserError(f"{self.shard.tar}: {row['key']} of {self.shard.parquet} is missing; {AGAIN}")
        expected = table_row(sample)
        for name, value in row.items():
            if value != expected[name]:
                told = f"{value!r:.60}, the record {sample.record.key} says {expected[name]!r:.60}"
                raise UserError(f"{self.shard.parquet}: {name}: {told}; {AGAIN}")
        decode_sample(sample, self.shard.tar)
        return sample


def _each(shards: Sequence[FinishedShard], processes: int) -> Iterator[ShardFindings]:
    if processes <= 1 or len(shards) <= 1:
        yield from map(verify_shard, shards)
        return
    with ProcessPoolExecutor(min(processes, len(shards)), mp_context=get_context("spawn")) as pool:
        yield from pool.map(verify_shard, shards)


def _file_facts(address: str) -> FileFacts:
    digest, size = hashlib.sha256(), 0
    with _opened(address) as file, told_in_one_line(address, "read"):
        while part := file.read(1 << 20):
            digest.update(part)
            size += len(part)
    return FileFacts(size, digest.hexdigest())


def _opened(address: str) -> BinaryIO:
    storage, name = split_address(address)
    with told_in_one_line(address, "read"):
        return storage.open(name)


def _key_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _different_facts(findings: Sequence[ShardFindings]) -> list[str]:
    """Shards of several builds in one folder: by fact, one shard of each value."""
    first: dict[str, dict[str, str]] = defaultdict(dict)
    for found in findings:
        for name, value in found.facts.items():
            first[name].setdefault(json.dumps(value, sort_keys=True), found.shard.name)
    return [
        f"shards of different builds: {name} is "
        + ", ".join(f"{value:.40} in {shard}" for value, shard in sorted(values.items(), key=lambda pair: pair[1])[:4])
        + "; finish what was begun here (--redo), or build each into a folder of its own"
        for name, values in sorted(first.items())
        if len(values) > 1
    ]


def _repeated_keys(findings: Sequence[ShardFindings]) -> list[str]:
    """Keys that stand in two shards, or twice in one: found by 64-bit hashes, then told by name."""
    hashes = np.concatenate([np.zeros(0, dtype=np.uint64), *(found.key_hashes for found in findings)])
    hashes.sort()
    repeated = set(np.unique(hashes[1:][hashes[1:] == hashes[:-1]]).tolist())
    if not repeated:
        return []
    places: dict[str, list[str]] = defaultdict(list)
    for found in findings:
        if repeated.isdisjoint(found.key_hashes.tolist()):
            continue
        with _opened(found.shard.parquet) as table:
            for row in table_rows(table):
                if _key_hash(row["key"]) in repeated:
                    places[row["key"]].append(found.shard.name)
    lines = [f"key {key} stands in {', '.join(names)}" for key, names in sorted(places.items()) if len(names) > 1]
    more = [f"and {len(lines) - 20} more repeated keys"] if len(lines) > 20 else []
    return [f"{line}; keys are unique in a folder: check the sources" for line in lines[:20]] + more


def _unfinished(names: Sequence[str], finished: set[str]) -> list[str]:
    return [name for name in names if (match := _PART.fullmatch(name)) and match["name"] not in finished]
