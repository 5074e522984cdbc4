"""One worker: the models of one device, and the flow that takes units through them into shards."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

from data_pipeline.build_settings import DataSettings, EngineSettings
from data_pipeline.engine.copies import unit_copies
from data_pipeline.engine.flow import Clock, Flow
from data_pipeline.engine.output import Output
from data_pipeline.engine.redo import FinishedShards
from data_pipeline.engine.steps import Item, load_steps
from data_pipeline.errors import UserError
from data_pipeline.record import Drop
from data_pipeline.sources import SourceSample, Unit


def devices_of(engine: EngineSettings) -> list[str]:
    """The device of each worker: `engine.workers` of them, in turn over the visible ones.

    Raises:
        UserError: a device that torch does not see.
    """
    if engine.device == "cpu":
        return ["cpu"] * (engine.workers or 1)
    import torch

    kind, _, number = engine.device.partition(":")
    if engine.device == "auto":
        visible = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    elif kind == "cuda" and int(number or 0) < torch.cuda.device_count():
        visible = [f"cuda:{int(number or 0)}"]
    else:
        raise UserError(
            f"engine.device={engine.device}: torch sees {torch.cuda.device_count()} CUDA devices here; "
            "expected auto, cpu or cuda:N"
        )
    return [visible[i % len(visible)] for i in range(engine.workers or len(visible))]


class Worker:
    """Models loaded once, units after units."""

    def __init__(self, settings: DataSettings, redo: str | None, device: str, workers: int) -> None:
        """
        Args:
            redo: the stage to run again over finished shards; None: build from the source.
            workers: how many share this machine, for its cores.
        Raises:
            UserError: a model cannot be loaded, or is another one than half of the output was made with.
        """
        self.settings = settings
        self.output = Output(settings, redo)
        self.steps = load_steps(settings, device, redo or "")
        self.threads = ThreadCounts.now()  # of the program around a build in its own process
        share = settings.engine.threads or max(1, len(os.sched_getaffinity(0)) // workers)
        ThreadCounts(share, share).set()
        self.output.hold_to({step.name: step.provenance for step in self.steps})
        self.source = FinishedShards(self.output, redo) if redo else settings.source.open()
        self.clock = Clock()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.steps = []  # the models' memory
        self.threads.set()

    def run(self, units: Iterable[Unit]) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Build units in their order; yields each name with its statistics when the shard is complete."""
        flow = Flow(self._read, self.steps, self.output.open_writer, self.settings)
        self.clock = flow.clock
        for unit, statistics in flow.run(units):
            yield unit.name, statistics

    def _read(self, unit: Unit) -> Iterator[SourceSample | Drop | Item]:
        copies = unit_copies(self.output, unit.name) if self.settings.duplicates.remove else {}
        for sample in self.source.samples(unit):
            copied = copies.get(sample.key) if isinstance(sample, SourceSample) else None
            if copied and isinstance(sample, SourceSample):
                yield Drop(sample.key, copied.reason, f"of {copied.of}", sample.url, copied.sha256, sample.alt_text)
            else:
                yield sample


class ThreadCounts(NamedTuple):
    """Of the libraries in this process."""

    opencv: int
    torch: int | None  # None: nothing has loaded it

    @classmethod
    def now(cls) -> ThreadCounts:
        import cv2

        loaded = sys.modules.get("torch")
        return cls(cv2.getNumThreads(), None if loaded is None else loaded.get_num_threads())

    def set(self) -> None:
        import cv2

        cv2.setNumThreads(self.opencv)
        if self.torch is not None and "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self.torch)
