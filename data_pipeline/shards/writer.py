"""Writes one shard, sample by sample: tar and table under temporary names, renamed when whole, stats last.

    with ShardWriter(folder, "00017", facts) as writer:
        for item in items:
            writer.add(item)  # Sample or Drop, in the order of the source

Equal samples in equal order give equal bytes in all three files. Memory: one sample and some hundred rows of text.
Whatever goes wrong, nothing of the shard is left, and the shards finished before are untouched.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipeline.errors import UserError
from data_pipeline.record import Drop, Sample
from data_pipeline.shards.metadata_table import TableWriter, table_row
from data_pipeline.shards.record_json import plain_text, record_from_json, record_to_json
from data_pipeline.shards.shard_stats import FileFacts, ShardStats, stats_to_json
from data_pipeline.shards.storage import storage_of, temporary_path, told_in_one_line
from data_pipeline.shards.tar_members import END, MAX_MEMBER_BYTES, member_bytes

NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
JPEG_START = b"\xff\xd8\xff"


class SampleRefused(UserError):
    """A sample that the reader would not take. Nothing of it was written: a `Drop` may take its place."""


def write_shard(
    folder: str | os.PathLike[str], name: str, items: Iterable[Sample | Drop], facts: Mapping[str, Any]
) -> ShardStats:
    """Write a whole shard from its samples and drops, in the order of the source.

    Raises:
        UserError: a file cannot be written (full disk, rights), or a sample is none that the reader would take.
    """
    with ShardWriter(folder, name, facts) as writer:
        for item in items:
            writer.add(item)
        return writer.finish()


class ShardWriter:
    """A shard being written. Leaving the block finishes it; leaving it by an exception removes it."""

    def __init__(self, folder: str | os.PathLike[str], name: str, facts: Mapping[str, Any]) -> None:
        """Begin a shard.

        Args:
            folder: path or fsspec URL; made if needed.
            name: of the files, without suffix.
            facts: what all shards of the build share (configuration hash, code version …); plain JSON values.
        """
        if not NAME_PATTERN.fullmatch(name):
            raise UserError(f"shard name {name!r:.100}: expected letters, digits, _, - or ., at most 100")
        self.storage = storage_of(folder)
        self.name = name
        self.facts = facts
        self.stats: ShardStats | None = None  # set when finished
        self._keys: set[str] = set()
        self._dropped: Counter[str] = Counter()
        self._nouns: Counter[str] = Counter()
        self._kept = 0
        self._files: dict[str, HashedFile] = {}
        try:
            with self._writing():
                for file in (f"{name}.tar", f"{name}.parquet"):
                    self._files[file] = HashedFile(temporary_path(self.storage, file))
                self._tar, self._table_file = self._files.values()
                self._table = TableWriter(self._table_file)
        except BaseException:
            self.discard()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()

    def add(self, item: Sample | Drop) -> None:
        """Write one sample, or the row of one that was dropped.

        Raises:
            SampleRefused: the key was there before, or the reader would not take the sample.
            UserError: it cannot be written (full disk, rights).
        """
        key = item.key if isinstance(item, Drop) else item.record.key
        where = f"{self.storage.address(self.name)}: {key}"
        if key in self._keys:
            raise SampleRefused(f"{where}: a second sample with this key; keys are unique in a source")
        try:
            members = [] if isinstance(item, Drop) else sample_members(item, where)
        except UserError as error:
            raise SampleRefused(str(error)) from error
        with self._writing():
            for name, data in members:
                self._tar.write(member_bytes(name, data))
            self._table.add(table_row(item))
        self._keys.add(key)
        if isinstance(item, Drop):
            self._dropped[item.reason] += 1
        else:
            self._kept += 1
            self._nouns.update(plain_text(entity.noun) for entity in item.record.entities)

    def finish(self) -> ShardStats:
        """Sync, rename, write the stats: from now on the shard is there. May be called twice."""
        if self.stats is not None:
            return self.stats
        try:
            with self._writing():
                self._table.close()
                self._tar.write(END)
                facts = {name: file.finish() for name, file in self._files.items()}
                stats = self._count(facts)
                stats_name = f"{self.name}_stats.json"
                stats_file = self._files[stats_name] = HashedFile(temporary_path(self.storage, stats_name))
                stats_file.write(stats_to_json(stats).encode())
                stats_file.finish()
                self.storage.remove(stats_name)  # a shard that is written anew is unfinished while its files change
                for name, file in self._files.items():
                    self.storage.publish(file.path, name)
                    file.published = True
        except BaseException:
            self.discard()
            raise
        self.stats = stats
        return stats

    def discard(self) -> None:
        """Remove all that was written of this shard; after `finish` this does nothing."""
        if self.stats is not None:
            return
        for name, file in self._files.items():
            file.abandon()
            if file.published:
                with told_in_one_line(self.storage.address(name), "removed"):
                    self.storage.remove(name)

    def _count(self, files: Mapping[str, FileFacts]) -> ShardStats:
        return ShardStats(
            name=self.name,
            read=len(self._keys),
            kept=self._kept,
            dropped=dict(self._dropped),
            entities=sum(self._nouns.values()),
            nouns=dict(self._nouns),
            files=files,
            facts=self.facts,
        )

    def _writing(self):  # type: ignore[no-untyped-def]
        return told_in_one_line(self.storage.address(self.name), "written")


class HashedFile(io.RawIOBase):
    """A temporary file that knows size and hash of what was written to it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.published = False
        self._abandoned = False
        self._hash = hashlib.sha256()
        self._size = 0
        self._file = path.open("wb")

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self._abandoned:
            return memoryview(data).nbytes  # the table's writer ends its file when it is collected
        self._file.write(data)
        self._hash.update(data)
        self._size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self._size

    def finish(self) -> FileFacts:
        """Force it to the disk and close it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return FileFacts(self._size, self._hash.hexdigest())

    def abandon(self) -> None:
        """Remove the file, if it still has its temporary name."""
        self._abandoned = True
        try:
            self._file.close()
        except OSError:  # what waits in its buffer does not fit on the disk: it is not wanted
            pass
        self.path.unlink(missing_ok=True)


def sample_members(sample: Sample, where: str) -> list[tuple[str, bytes]]:
    """Names and bytes of a sample's tar members, in their order: picture, caption, record, references.

    Raises:
        UserError: the reader would not take it.
    """
    record = sample.record
    text = record_to_json(record)
    record_from_json(text, where)
    names = {name for entity in record.entities for name in entity.references}
    if names != set(sample.references):
        wrong = sorted(names ^ set(sample.references))[0]
        raise UserError(f"{where}: {wrong}: named by an entity but not given as a picture, or the other way round")
    if not sample.jpeg.startswith(JPEG_START):
        raise UserError(f"{where}: the picture is no JPEG")
    members = [(f"{record.key}.jpg", sample.jpeg), (f"{record.key}.txt", plain_text(record.caption).encode())]
    members.append((f"{record.key}.json", text.encode()))
    members += [(name, sample.references[name]) for name in sorted(names, key=lambda name: (len(name), name))]
    for name, data in members:
        if len(data) > MAX_MEMBER_BYTES:
            raise UserError(f"{where}: {name} has {len(data)} bytes; members have at most {MAX_MEMBER_BYTES}")
    return members
