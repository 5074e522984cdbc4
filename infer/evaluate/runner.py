"""One restartable run: look at what is there, tell the hours, let one or several processes do the rest.

Run the same command again after any kill: what is stored is kept, the tables come out the same.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from queue import Empty

import torch
from tqdm import tqdm

from data_pipeline.errors import UserError
from infer.drawing import usable_device
from infer.evaluate.cases import Protocol
from infer.evaluate.methods import MethodPlan, plan_methods
from infer.evaluate.metrics import check_metrics
from infer.evaluate.protocols import class_cases, load_protocol
from infer.evaluate.settings import EvaluateSettings
from infer.evaluate.store import Store
from infer.evaluate.work import Tell, Unit, Worker, units_of


@dataclass(frozen=True)
class Scope:
    """Which part of a configuration is asked for now."""

    only: tuple[str, ...] = ()  # methods of the configuration, their sweeps with them; (): all
    limit: int | None = None  # groups of each part; None: all


@dataclass(frozen=True)
class Plan:
    """A configuration, opened: what is asked for and of whom."""

    run: EvaluateSettings
    protocol: Protocol
    methods: tuple[MethodPlan, ...]

    @classmethod
    def of(cls, run: EvaluateSettings, scope: Scope) -> Plan:
        """Open the protocol and check every method's settings; no weights are loaded.

        Raises:
            UserError: anything in the configuration that cannot work.
        """
        for name in scope.only:
            if name not in run.methods:
                raise UserError(f"--only {name}: no such method; the configuration has {', '.join(run.methods)}")
        check_metrics(run.metrics)
        chosen = [plan for plan in plan_methods(run) if not scope.only or _belongs(plan, run, scope.only)]
        return cls(run, _limited(_with_class_cases(run, load_protocol(run.protocol)), scope.limit), tuple(chosen))

    def units(self) -> list[Unit]:
        return units_of(self.protocol, self.methods)


def _belongs(plan: MethodPlan, run: EvaluateSettings, names: Sequence[str]) -> bool:
    return (run.sweeps[plan.sweep[0]].method if plan.sweep else plan.name) in names


def _with_class_cases(run: EvaluateSettings, protocol: Protocol) -> Protocol:
    extra = class_cases(protocol, run.class_drift.images) if run.class_drift.images else ()
    return replace(protocol, cases=protocol.cases + extra)


def _limited(protocol: Protocol, limit: int | None) -> Protocol:
    """The first groups of each part."""
    kept: dict[str, list[str]] = {}
    for cases in protocol.groups():
        kept.setdefault(cases[0].part, []).append(cases[0].group)
    allowed = {part: set(groups[:limit]) for part, groups in kept.items()}
    return replace(protocol, cases=tuple(case for case in protocol.cases if case.group in allowed[case.part]))


def missing_pictures(plan: Plan) -> tuple[int, int]:
    """Pictures that are asked for, and how many of them are not there yet.

    Raises:
        UserError: a stored picture was drawn with other settings than the method has now.
    """
    store, asked, missing = Store(plan.run.output), 0, 0
    for unit in plan.units():
        asked += len(unit.cases)
        missing += sum(store.picture(unit.plan, case) is None for case in unit.cases)
    return asked, missing


def estimate(plan: Plan, processes: int) -> float:
    """Hours until all is drawn and scored."""
    worker = Worker(plan.run, plan.protocol, plan.methods, lambda *_: None)
    with _threads(plan.run.threads):
        return worker.seconds() / processes / 3600


def process_count(run: EvaluateSettings) -> int:
    """As asked for, else as many as the cores hold, or one for each GPU."""
    if run.processes:
        return run.processes
    if usable_device(run.device).startswith("cuda"):
        return torch.cuda.device_count() if run.device in ("auto", "cuda") else 1
    return max(1, (os.cpu_count() or 1) // run.threads)


def execute(plan: Plan, scope: Scope, processes: int, total: int) -> list[str]:
    """Draw and score all that is missing.

    Args:
        total: pictures still to be drawn, for the progress bar.
    Returns:
        Holes, one line each.
    """
    holes: list[str] = []
    with tqdm(total=total, unit="picture", disable=None) as bar:

        def tell(kind: str, text: str, count: int) -> None:
            if kind == "drawn":
                bar.set_description(text, refresh=False)
                bar.update(count)
            elif text not in holes:
                holes.append(text)
                bar.write(f"hole: {text}", file=sys.stderr)

        if processes == 1:
            with _threads(plan.run.threads):
                Worker(plan.run, plan.protocol, plan.methods, tell).work()
        else:
            _side_by_side(plan.run, scope, processes, tell)
    return holes


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _side_by_side(run: EvaluateSettings, scope: Scope, processes: int, tell: Tell) -> None:
    """Several processes share the units; each opens the protocol for itself."""
    context = multiprocessing.get_context("spawn")
    told: Queue[tuple[str, str, int]] = context.Queue()
    stop = context.Event()
    workers = [context.Process(target=_child, args=(run, scope, i, told, stop)) for i in range(processes)]
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers) or not told.empty():
            try:
                tell(*told.get(timeout=0.5))
            except Empty:
                continue
    except KeyboardInterrupt:
        stop.set()
        raise
    finally:
        for worker in workers:
            worker.join()
    for worker in workers:
        if worker.exitcode:
            tell("hole", f"a process ended with status {worker.exitcode}; run the same command again", 0)


def _child(run: EvaluateSettings, scope: Scope, number: int, told: Queue[tuple[str, str, int]], stop: Event) -> None:
    parent = multiprocessing.parent_process()
    torch.set_num_threads(run.threads)
    if usable_device(run.device) == "cuda":
        run = run.model_copy(update={"device": f"cuda:{number % torch.cuda.device_count()}"})
    plan = Plan.of(run, scope)

    def go_on() -> bool:
        return not stop.is_set() and parent is not None and parent.is_alive()

    try:
        Worker(run, plan.protocol, plan.methods, lambda *event: told.put(event)).work(go_on)
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # the parent says so
