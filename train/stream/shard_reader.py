"""Open shards of one source in one process: samples by number, and the next shards fetched while these are read.

Each shard is opened (fetched if it lies elsewhere, its samples' places read from the headers) by a thread of its own.
A process keeps the shards of two windows of each of its slots; what it leaves is closed, and with it the fetched copy
is gone. Nothing of this goes from a process to another: the workers of a loader open their own.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import UserError
from data_pipeline.record import Sample
from data_pipeline.shards.shard_index import sample_extents, sample_of_bytes
from train.stream.shard_list import ShardEntry, ShardList
from train.stream.shard_places import Damaged, ShardPlace, fetched, retried


class OpenShard:
    """A tar whose samples are read by their number."""

    def __init__(self, file: BinaryIO, where: str, count: int) -> None:
        """
        Args:
            file: open for reading; left to the caller, who may close it.
            where: its address, for messages.
            count: samples it must have.
        Raises:
            Damaged: it is no tar of the dataset builder, or has another number of samples.
        """
        self.where, self._descriptor = where, -1
        with _found_damaged():
            self.extents = sample_extents(file, where)  # (N, 2) bytes
        if len(self.extents) != count:
            raise Damaged(f"{where}: {len(self.extents)} samples, its stats say {count}")
        self._descriptor = os.dup(file.fileno())

    def sample(self, row: int) -> Sample:
        """Sample `row`, still encoded.

        Raises:
            Damaged: something in it is not as it should be.
            OSError: the file cannot be read now.
        """
        start, end = (int(value) for value in self.extents[row])
        # With an offset of its own, because a forked process shares the file's.
        data = os.pread(self._descriptor, end - start, start)
        with _found_damaged():
            return sample_of_bytes(data, self.where, start)

    def close(self) -> None:
        """Give the file up, and with it a fetched copy."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


def open_shard(place: ShardPlace, entry: ShardEntry, scratch: Path) -> OpenShard:
    """Open a shard in place, or a copy of it.

    Raises:
        Damaged: it is not what its stats file says.
        UserError: it cannot be read.
    """
    where = place.address(entry.tar)

    if place.local is not None:
        path = place.local / entry.tar
        return retried(lambda: _opened(path.open("rb"), where, entry.samples), where)
    file = retried(
        lambda: fetched(place, entry.tar, entry.bytes, entry.sha256, scratch), where, passing=(OSError, Damaged)
    )
    return _opened(file, where, entry.samples)


def _opened(file: BinaryIO, where: str, count: int) -> OpenShard:
    with file:
        return OpenShard(file, where, count)


class ShardReader:
    """The open shards of one source."""

    def __init__(self, shards: ShardList, scratch: Path, window: int) -> None:
        """
        Args:
            window: shards that a slot reads at the same time.
        """
        self.shards, self.scratch, self.window = shards, scratch, window
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"shards": self.shards, "scratch": self.scratch, "window": self.window}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _forget(self) -> None:
        self._process = os.getpid()
        self._open: OrderedDict[int, Future[OpenShard]] = OrderedDict()
        self._damaged: dict[int, str] = {}  # what was found of whole shards
        self._slots: set[int] = set()

    def sample(self, shard: int, row: int) -> Sample:
        """Sample `row` of a shard.

        Raises:
            Damaged: it, or the whole shard, is not as it should be.
            UserError: the shard cannot be read.
        """
        damage = self.is_damaged(shard)
        if damage is not None:
            raise Damaged(damage)
        for last in (False, True):
            try:
                return self._future(shard).result().sample(row)
            except Damaged as error:
                if self._open[shard].exception() is error:
                    self._damaged[shard] = str(error)  # the error itself would keep all that it came through
                    self._close(shard)
                raise
            except OSError as error:  # a server that was away, a handle gone stale: opened anew once
                self._close(shard)
                if last:
                    where = self.shards.place.address(self.shards.entries[shard].tar)
                    raise UserError(f"{where}: cannot be read ({error}); check the disk, then run again") from error
        raise AssertionError("the second attempt returns or raises")

    def is_damaged(self, shard: int) -> str | None:
        """What is wrong with a whole shard, if it was found to be."""
        self._after_fork()
        return self._damaged.get(shard)

    def want(self, slot: int, shards: Iterable[int]) -> None:
        """Begin to open the shards that a slot will read next; those nobody asked for in a while are closed."""
        self._after_fork()
        self._slots.add(slot)
        for shard in shards:
            if shard not in self._damaged:
                self._future(shard)

    def _future(self, shard: int) -> Future[OpenShard]:
        self._after_fork()
        if shard not in self._open:
            future: Future[OpenShard] = Future()
            self._open[shard] = future
            # Not a pool: its threads would be waited for at the end of the process, which may be in a hurry.
            threading.Thread(target=self._work, args=(future, shard), daemon=True).start()
        self._open.move_to_end(shard)
        while len(self._open) > 2 * self.window * max(1, len(self._slots)):
            self._close(next(iter(self._open)))
        return self._open[shard]

    def _work(self, future: Future[OpenShard], shard: int) -> None:
        try:
            future.set_result(open_shard(self.shards.place, self.shards.entries[shard], self.scratch))
        except BaseException as error:  # raised where the shard is asked for
            future.set_exception(error)

    def _close(self, shard: int) -> None:
        self._open.pop(shard).add_done_callback(_close_result)

    def _after_fork(self) -> None:
        """A forked process has the parent's futures, but not the threads that would complete them."""
        if self._process != os.getpid():
            self._forget()


def _close_result(future: Future[OpenShard]) -> None:
    if future.exception() is None:
        future.result().close()


@contextmanager
def _found_damaged() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise Damaged(str(error)) from error
