"""Random access to the samples of finished shards, for a map-style data set.

    index = ShardIndex(list_shards(folder))
    sample = index[12345]  # a Sample; decode_sample() gives its pixels

How many samples a shard has stands in its stats; where they lie in the tar is read once from its headers, when the
shard is first asked for. 16 bytes a sample; no open file is held, so it goes to the workers of a DataLoader.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.record import Sample
from data_pipeline.shards.reader import FinishedShard, read_stats, samples_of
from data_pipeline.shards.storage import LocalStorage, split_address, told_in_one_line
from data_pipeline.shards.tar_members import END, read_members, scan_members


class ShardIndex:
    """The samples of several shards, numbered from 0 in the order of the shards."""

    def __init__(self, shards: Sequence[FinishedShard]) -> None:
        """Read the stats of all shards.

        Raises:
            UserError: a stats file is damaged, or the shards are not on local paths.
        """
        for shard in shards[:1]:
            if not isinstance(split_address(shard.tar)[0], LocalStorage):
                raise UserError(f"{shard.tar}: random access needs local files; copy the folder, or read it in order")
        self.shards = list(shards)
        self.counts = [read_stats(shard).kept for shard in shards]
        self.ends = np.cumsum([0, *self.counts])[1:]  # (shards,) number of the first sample of the next shard
        self._extents: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def place(self, item: int) -> tuple[int, int]:
        """Number of the shard and of the sample in it."""
        if not 0 <= item < len(self):
            raise IndexError(f"sample {item} of {len(self)}")
        shard = int(np.searchsorted(self.ends, item, side="right"))
        return shard, item - int(self.ends[shard]) + self.counts[shard]

    def __getitem__(self, item: int) -> Sample:
        shard, position = self.place(item)
        start, end = (int(value) for value in self.extents(shard)[position])
        path = self.shards[shard].tar
        with told_in_one_line(path, "read"), open(path, "rb") as file:
            file.seek(start)
            data = file.read(end - start)
        return sample_of_bytes(data, path, start)

    def extents(self, shard: int) -> np.ndarray:
        """Where each sample of a shard begins and ends in its tar, (N, 2) int64 bytes.

        Raises:
            UserError: the tar is damaged or holds another number of samples than its stats say.
        """
        if shard not in self._extents:
            self._extents[shard] = self._scan(shard)
        return self._extents[shard]

    def _scan(self, shard: int) -> np.ndarray:
        path = self.shards[shard].tar
        with told_in_one_line(path, "read"), open(path, "rb") as file:
            found = sample_extents(file, path)
        if len(found) != self.counts[shard]:
            raise UserError(
                f"{path}: {len(found)} samples; {self.shards[shard].stats} says {self.counts[shard]}: "
                "delete the stats file and run the build again"
            )
        return found


def sample_extents(file: BinaryIO, where: str) -> np.ndarray:
    """Where each sample of an open tar begins and ends, (N, 2) int64 bytes; only headers are read.

    Raises:
        UserError: the tar is damaged.
    """
    found: list[tuple[int, int]] = []
    last = None
    for member in scan_members(file, where):
        key = member.name.partition(".")[0]
        if key == last:
            found[-1] = (found[-1][0], member.end)
        else:
            found.append((member.offset, member.end))
        last = key
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def sample_of_bytes(data: bytes, where: str, start: int) -> Sample:
    """The sample whose members are `data`, cut out of a tar at byte `start`.

    Raises:
        UserError: something in it is not as it should be.
    """
    return next(samples_of(read_members(io.BytesIO(data + END), where, start=start), where))
