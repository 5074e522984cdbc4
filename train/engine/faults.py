"""What can go wrong between two steps, and how all processes of a run come to know of it at the same one.

SIGTERM and SIGUSR1 (what a scheduler sends before it takes the machine) and the end of `minutes` only leave a note
here; the loop finishes its step, writes a checkpoint and ends with status 0. A step whose loss or gradients are not
finite is skipped everywhere and counted; after `optimizer.max_skipped` on end the run stops and names the samples. A
process that dies ends the others with one line each. What a process knows travels in one reduction of two integers a
step, over gloo and thus in main memory: it waits for no GPU, and the connection of a process that died breaks at once.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed

from data_pipeline.errors import UserError
from train.settings import RunSettings

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
TIME_IS_UP = 0  # among the numbers of signals, which begin at 1
NOTHING_ASKED = -1
PATIENCE = timedelta(hours=1)  # the others wait here while the main process validates or saves
KEYS_SHOWN = 8


class FaultWatch:
    """Used as a context around the steps of a run; entered by all processes."""

    def __init__(self, settings: RunSettings, accelerator: Accelerator, *, skipped: int = 0) -> None:
        """
        Args:
            skipped: steps that were skipped before the checkpoint this run goes on from.
        """
        self.settings = settings
        self.skipped = skipped
        self.stop: str | None = None  # name of the signal, or "minutes", once all processes know of it
        self._asked = NOTHING_ASKED  # number of the signal that reached this process
        self._deadline = time.monotonic() + 60 * settings.minutes if settings.minutes else math.inf
        self._on_end: list[int] = []  # skipped steps since the last good one
        self._main = accelerator.is_main_process
        self._together = accelerator.num_processes > 1
        self._group: Any = distributed.new_group(backend="gloo", timeout=PATIENCE) if self._together else None

    def __enter__(self) -> FaultWatch:
        # Python takes handlers in its main thread only; elsewhere the program around the run has the signals.
        mine = STOP_SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._note) for number in mine}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        told = _in_one_line(error, self.settings.name) if isinstance(error, RuntimeError) else None
        if told:
            raise told from error

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = number

    def after_step(self, step: int, applied: bool, passes: Sequence[tuple[Tensor, Sequence[str]]]) -> bool:
        """To be called once a step by all processes; afterwards `stop` is the same on all.

        Args:
            step: 0-based.
            applied: whether this process has taken the step; false where a loss or gradient was not finite.
            passes: of each forward pass of this process, the loss and the keys of its samples. Read after a skip only.
        Returns:
            Whether all processes have taken the step.
        Raises:
            UserError: `optimizer.max_skipped` steps on end were skipped; the other processes end with status 2.
        """
        asked = max(self._asked, TIME_IS_UP if time.monotonic() >= self._deadline else NOTHING_ASKED)
        asked, missed = self._largest(asked, int(not applied))
        if asked != NOTHING_ASKED:
            self.stop = "minutes" if asked == TIME_IS_UP else signal.Signals(asked).name
        if not missed:
            self._on_end.clear()
            return True
        self.skipped += 1
        self._on_end.append(step)
        culprits = self._culprits(passes)
        if self._main:
            keys = [key for each in culprits for key in each]
            self._write_down(step, keys)
        if len(self._on_end) >= self.settings.optimizer.max_skipped:
            if not self._main:
                with suppress(RuntimeError):  # a launcher ends all at the first exit: let the main process speak first
                    self.wait()
                raise SystemExit(2)
            raise UserError(self._verdict(keys))
        return False

    def wait(self) -> None:
        """Until all processes are here: after work of the main process alone, before collectives of less patience."""
        self._largest(0)

    def _largest(self, *values: int) -> list[int]:
        """The largest over all processes, value by value."""
        if not self._together:
            return list(values)
        shared = torch.tensor(values)
        distributed.all_reduce(shared, op=distributed.ReduceOp.MAX, group=self._group)
        return [int(value) for value in shared]

    def _culprits(self, passes: Sequence[tuple[Tensor, Sequence[str]]]) -> list[list[str]]:
        """By process, the samples of the passes whose loss is not finite; of all passes, if no loss is."""
        found = [key for loss, keys in passes if not torch.isfinite(loss).all() for key in keys]
        own = (found, [key for _, keys in passes for key in keys])
        gathered: list[Any] = [own]
        if self._together:
            gathered = [None] * distributed.get_world_size(self._group)
            distributed.all_gather_object(gathered, own, group=self._group)
        by_loss = [process[0] for process in gathered]
        return by_loss if any(by_loss) else [process[1] for process in gathered]

    def _write_down(self, step: int, keys: list[str]) -> None:
        self.settings.folder.mkdir(parents=True, exist_ok=True)
        with open(self.settings.folder / "skipped.jsonl", "a") as handle:
            handle.write(json.dumps({"step": step + 1, "keys": keys}) + "\n")

    def _verdict(self, keys: list[str]) -> str:
        more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
        return (
            f"{self.settings.name}: loss or gradients were not finite in {len(self._on_end)} steps on end "
            f"(last: step {self._on_end[-1] + 1}, samples {', '.join(keys[:KEYS_SHOWN])}{more}; all of them in "
            f"{self.settings.folder / 'skipped.jsonl'}); lower optimizer.learning_rate, or take these samples out, "
            "and run again from the last checkpoint"
        )


def leave_signals_to_the_loop(worker: int) -> None:
    """`worker_init_fn` of a loader: a scheduler signals every process of a job, but the step needs its samples."""
    for number in (*STOP_SIGNALS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _in_one_line(error: RuntimeError, name: str) -> UserError | None:
    """What a person can do about an error that comes from another process."""
    text = str(error)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if "gloo" in text or isinstance(error, distributed.DistError):
        return UserError(
            f"{name}: lost another process of this run ({first}); look for its own message, then give the same command "
            "again: it goes on from the last checkpoint"
        )
    if text.startswith("DataLoader worker"):
        return UserError(
            f"{name}: a loading process died ({first}); out of memory is the usual cause: lower data.workers or "
            "batch_size, and give the same command again"
        )
    return None
