"""Counts what was read and what was damaged, over all workers of a process, and stops a run that skips too much."""

from __future__ import annotations

import sys

import torch
from torch.utils.data import get_worker_info

from data_pipeline.errors import UserError

MOST_DAMAGED = 0.01  # of what was read
SOME_SAMPLES, SOME_SHARDS = 10, 1  # may be damaged whatever the share
_READ, _DAMAGED, _SHARDS, _DAMAGED_SHARDS = range(4)


class DamageCount:
    """What the workers of one process have read. In shared memory, one row for each: no two write the same numbers."""

    def __init__(self, workers: int) -> None:
        self._counts = torch.zeros(1 + max(workers, 1), 4, dtype=torch.int64).share_memory_()
        self._seen: set[tuple[str, ...]] = set()  # by this process

    @property
    def samples(self) -> int:
        """Damaged samples that were skipped, those of damaged shards apart."""
        return int(self._counts[:, _DAMAGED].sum())

    @property
    def shards(self) -> int:
        """Damaged shards that were skipped."""
        return int(self._counts[:, _DAMAGED_SHARDS].sum())

    def read(self, source: str, shard: str) -> None:
        """A sample was read."""
        self._row()[_READ] += 1
        self._first(_SHARDS, source, shard)

    def damaged_sample(self, source: str, shard: str, row: int, error: Exception) -> None:
        """A sample is skipped.

        Raises:
            UserError: too many were.
        """
        self._row()[_READ] += 1
        if self._first(_DAMAGED, source, shard, str(row)):
            _say(f"skipped: {error}")
        self._check(_DAMAGED, _READ, SOME_SAMPLES, "samples", str(error))

    def damaged_shard(self, source: str, shard: str, told: str) -> None:
        """A whole shard is skipped.

        Raises:
            UserError: too many were.
        """
        self._first(_SHARDS, source, shard)
        if self._first(_DAMAGED_SHARDS, source, shard, "whole"):
            _say(f"shard skipped: {told}")
        self._check(_DAMAGED_SHARDS, _SHARDS, SOME_SHARDS, "shards", told)

    def _row(self) -> torch.Tensor:
        worker = get_worker_info()
        return self._counts[0 if worker is None else 1 + worker.id % (len(self._counts) - 1)]

    def _first(self, column: int, *what: str) -> bool:
        if what in self._seen:
            return False
        self._seen.add(what)
        self._row()[column] += 1
        return True

    def _check(self, damaged: int, read: int, some: int, what: str, told: str) -> None:
        bad, whole = int(self._counts[:, damaged].sum()), int(self._counts[:, read].sum())
        if bad > some + MOST_DAMAGED * whole:
            raise UserError(
                f"{bad} of the {whole} {what} read are damaged, over {MOST_DAMAGED:.0%}; the last: {told}; "
                "check the shards with `subject-diffusion data verify`"
            )


def plain_error(error: UserError) -> UserError:
    """The one line of an error that a worker of torch's DataLoader raised: it comes with a traceback around it."""
    text = str(error)
    if not text.startswith("Caught "):
        return error
    return UserError(text.rstrip().splitlines()[-1].partition(": ")[2])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
