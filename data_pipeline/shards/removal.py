"""Take-downs: samples named by url or sha256 leave the shards that hold them, and the tables say that they left.

Only shards that hold one are written anew, each whole or not at all; url and sha256 stay in the table, so that the same
list can be replayed over another copy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

from data_pipeline.errors import UserError
from data_pipeline.record import Drop
from data_pipeline.shards.metadata_table import KEPT, table_rows
from data_pipeline.shards.reader import FinishedShard, list_shards, read_drops, read_shard, read_stats
from data_pipeline.shards.storage import split_address, told_in_one_line
from data_pipeline.shards.writer import ShardWriter

REASON = "taken_down"
_SHA256 = re.compile("[0-9a-f]{64}")


def read_list(path: Path) -> set[str]:
    """The urls and sha256 of a file, one a line; what follows a # at the start of a line is for people.

    Raises:
        UserError: it cannot be read, is empty, or a line is neither.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a text file of urls and sha256") from error
    listed = {line.strip() for line in lines if line.strip() and not line.startswith("#")}
    for entry in sorted(listed):
        if not _SHA256.fullmatch(entry) and "://" not in entry:
            raise UserError(f"{path}: {entry[:80]!r}: expected a url or a sha256 of 64 digits on each line")
    if not listed:
        raise UserError(f"{path}: names nothing; expected a url or a sha256 on each line")
    return listed


def remove_samples(folder: str | os.PathLike[str], listed: Collection[str]) -> dict[str, int]:
    """Take every sample whose url or sha256 is listed out of a folder's finished shards.

    Returns:
        Shard name -> samples removed, of the shards that were written anew.
    Raises:
        UserError: no finished shard, or one cannot be read or written; those done before stay done.
    """
    removed, shards = dict[str, int](), list_shards(folder)
    if not shards:
        raise UserError(f"{os.fspath(folder)}: no finished shard (NAME_stats.json); give the output folder of a build")
    for shard in shards:
        keys = _listed_keys(shard, listed)
        if keys:
            _rewrite(folder, shard, keys)
            removed[shard.name] = len(keys)
    return removed


def _listed_keys(shard: FinishedShard, listed: Collection[str]) -> set[str]:
    storage, name = split_address(shard.parquet)
    with told_in_one_line(shard.parquet, "read"), storage.open(name) as table:
        return {
            row["key"]
            for row in table_rows(table)
            if row["status"] == KEPT and (row["url"] in listed or row["sha256"] in listed)
        }


def _rewrite(folder: str | os.PathLike[str], shard: FinishedShard, keys: Collection[str]) -> None:
    with ShardWriter(folder, shard.name, read_stats(shard).facts) as writer:
        for drop in read_drops(folder, shard.name):
            writer.add(drop)
        for sample in read_shard(shard.tar):
            record = sample.record
            gone = Drop(record.key, REASON, "", record.url, record.sha256)  # what it said is gone too
            writer.add(gone if record.key in keys else sample)
