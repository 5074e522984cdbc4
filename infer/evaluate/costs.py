"""What a piece of work takes: seconds, and memory at its peak; of a method's drawing, and of its tuning before that."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

RESET = Path("/proc/self/clear_refs")  # of Linux; "5" sets a process's peak back to what it holds now


class Costs:
    """Measured between entering and leaving; a piece within a piece takes the peak for itself."""

    seconds = 0.0
    memory_bytes = 0  # of the accelerator, else of this process with all that it has loaded

    def __enter__(self) -> Costs:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):  # elsewhere the peak counts from the process's start
                RESET.write_text("5")
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        if torch.cuda.is_available():
            self.memory_bytes = int(torch.cuda.max_memory_allocated())
        else:
            self.memory_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
