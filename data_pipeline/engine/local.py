"""Workers on this machine: one process a device, each with its own models, fed with units as they ask for them.

A worker that dies (out of memory, killed) costs the units it held: they are given to another one, until a unit has cost
`engine.attempts` workers. A worker whose parent dies ends itself.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from data_pipeline.build_settings import DataSettings
from data_pipeline.engine.worker import Worker, devices_of
from data_pipeline.errors import UserError
from data_pipeline.sources import Unit

Report = tuple[str, Mapping[str, Any]]  # unit's name, its statistics


def run_units(settings: DataSettings, redo: str | None, units: Sequence[Unit]) -> Iterator[Report]:
    """Build all units; yields each as its shard is complete, in any order.

    Raises:
        UserError: a worker's own, or a unit that no worker survives.
    """
    devices = devices_of(settings.engine)
    if len(devices) == 1:  # no process of its own: quicker to start, and simple to look into
        with Worker(settings, redo, devices[0], workers=1) as worker:
            yield from worker.run(iter(units))
    else:
        yield from Crew(settings, redo, devices[: max(1, len(units))]).run(units)


class Crew:
    """Several workers."""

    def __init__(self, settings: DataSettings, redo: str | None, devices: Sequence[str]) -> None:
        self.settings, self.redo, self.devices = settings, redo, devices
        self._context = multiprocessing.get_context("spawn")
        self._held: dict[Connection, list[Unit]] = {}
        self._processes: dict[Connection, tuple[Any, str]] = {}

    def run(self, units: Sequence[Unit]) -> Iterator[Report]:
        """See `run_units`."""
        waiting, left, cost = deque(units), {unit.name for unit in units}, Counter[str]()
        idle: list[Connection] = []  # asked for a unit while none was waiting; a dead worker may bring one back
        for device in self.devices:
            self._start(device)
        try:
            while left:
                for pipe in wait(list(self._processes)):
                    assert isinstance(pipe, Connection)
                    try:
                        message = pipe.recv()
                    except (EOFError, ConnectionResetError):
                        device = self._processes[pipe][1]
                        self._bury(pipe, waiting, cost)
                        idle = [other for other in idle if other is not pipe]
                        self._start(device)
                        continue
                    if message is None:
                        idle.append(pipe)
                    elif isinstance(message, UserError):
                        raise message
                    else:
                        name, statistics = message
                        left.discard(name)
                        self._held[pipe] = [unit for unit in self._held[pipe] if unit.name != name]
                        yield name, statistics
                while idle and waiting:
                    pipe = idle.pop(0)
                    self._held[pipe].append(waiting[0])
                    pipe.send(waiting.popleft())
        finally:
            self._stop()

    def _start(self, device: str) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_work, args=(theirs, self.settings, self.redo, device, len(self.devices)), daemon=False
        )
        process.start()
        theirs.close()
        self._processes[ours], self._held[ours] = (process, device), []

    def _bury(self, pipe: Connection, waiting: deque[Unit], cost: Counter[str]) -> None:
        process, _ = self._processes.pop(pipe)
        process.join()
        held = self._held.pop(pipe)
        for unit in reversed(held):
            cost[unit.name] += 1
            waiting.appendleft(unit)
        # A worker that dies before it holds anything would die for ever.
        cost["before the first unit"] += not held
        name, deaths = cost.most_common(1)[0]
        if deaths >= self.settings.engine.attempts:
            raise UserError(
                f"{name}: {deaths} workers died over it (the last with exit status {process.exitcode}, -9 is often a "
                "lack of memory); look at that unit, lower batch sizes or engine.window, then start again"
            )

    def _stop(self) -> None:
        for process, _ in self._processes.values():
            process.terminate()
        for pipe, (process, _) in self._processes.items():
            process.join()
            pipe.close()


def _work(pipe: Connection, settings: DataSettings, redo: str | None, device: str, workers: int) -> None:
    """One worker: asks for units, one ahead of what it is building, and reports what is complete."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sending = threading.Lock()  # units are asked for in another thread than the one that reports

    def tell(message: object) -> None:
        with sending:
            pipe.send(message)

    def units() -> Iterator[Unit]:
        while True:
            tell(None)
            yield pipe.recv()

    try:
        with Worker(settings, redo, device, workers) as worker:
            for report in worker.run(units()):
                tell(report)
    except UserError as error:
        tell(error)
    except (KeyboardInterrupt, EOFError, BrokenPipeError):
        pass


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
