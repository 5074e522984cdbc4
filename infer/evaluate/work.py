"""The work of a run: draw what is missing, score it, group by group, alone or beside other processes.

A unit is a method and a group of cases. Whoever claims it draws its missing pictures in fixed batches (so that a
picture is bit for bit the same however often the run was killed), then scores them. What fails is a hole; the rest
goes on.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from data_pipeline.errors import UserError
from infer.evaluate.cases import Case, Protocol
from infer.evaluate.costs import Costs
from infer.evaluate.methods import Answer, Method, MethodPlan, create
from infer.evaluate.metrics import Drawn, Metric, load_metric
from infer.evaluate.settings import EvaluateSettings
from infer.evaluate.store import Made, Store, open_picture

Cases = tuple[Case, ...]
Tell = Callable[[str, str, int], None]  # ("drawn", method, pictures) or ("hole", line, 0)


@dataclass(frozen=True)
class Unit:
    """A method, and the cases of one group that it has an answer to."""

    plan: MethodPlan
    group: str
    cases: Cases

    def batches(self, size: int) -> list[Cases]:
        return [self.cases[start : start + size] for start in range(0, len(self.cases), size)]


def units_of(protocol: Protocol, plans: Sequence[MethodPlan]) -> list[Unit]:
    """All work of a run, methods in their order."""
    groups = protocol.groups()
    units = []
    for plan in plans:
        seen: dict[str, int] = {}
        for cases in groups:
            part = cases[0].part
            seen[part] = seen.get(part, 0) + 1
            answered = tuple(case for case in cases if plan.answers(case))
            if answered and (plan.groups is None or seen[part] <= plan.groups):
                units.append(Unit(plan, cases[0].group, answered))
    return units


class Worker:
    """Does units, one process's share."""

    def __init__(self, run: EvaluateSettings, protocol: Protocol, plans: Sequence[MethodPlan], tell: Tell) -> None:
        self.run, self.protocol, self.tell = run, protocol, tell
        self.store = Store(run.output)
        self.units = units_of(protocol, plans)
        self._method: tuple[str, Method | None] = ("", None)  # the last one loaded; None: it cannot be loaded

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        """By name; one that cannot be loaded is a hole."""
        found = {}
        for name in self.run.metrics:
            try:
                found[name] = load_metric(name, self.run, self.protocol)
            except UserError as error:
                self.tell("hole", f"metric {name}: {error}", 0)
        return found

    def work(self, go_on: Callable[[], bool] = lambda: True) -> None:
        """Do all units that nobody else is at; stops between batches when `go_on()` says so."""
        for unit in self.units:
            with self.store.claim(unit.plan, unit.group) as mine:
                if not mine:
                    continue
                with self._holes(f"{unit.plan.name}, {unit.group}"):
                    for _ in self._draw(unit):
                        if not go_on():
                            return
                    self._score(unit)

    def seconds(self) -> float:
        """Estimated seconds of all that is missing, for one process: the first batches are timed at few steps."""
        total, rates = 0.0, dict[str, tuple[float, float]]()  # method of the configuration: fixed, a step
        for unit in self.units:
            missing = self._missing(unit)
            name = unit.plan.sweep[0] if unit.plan.sweep else unit.plan.name
            if missing and name not in rates:
                rates[name] = (0.0, 0.0)
                with self._holes(unit.plan.name):
                    rates[name] = self._rate(unit)
            if missing:
                fixed, a_step = rates[name]
                total += missing * (fixed + a_step * getattr(unit.plan.settings, "steps", 0))
        return total

    def _rate(self, unit: Unit) -> tuple[float, float]:
        """Seconds of a picture: fixed, and of each step."""
        cases = unit.batches(self.run.batch_size)[0]
        took = []
        several = getattr(unit.plan.settings, "steps", 0) > 3
        for steps in (1, 1, 3) if several else (None, None):  # the first one warms up
            settings = unit.plan.settings.model_copy(update={"steps": steps} if steps else {})
            method = create(replace(unit.plan, settings=settings), self.run)
            start = time.perf_counter()
            answers = method.draw(cases)
            took.append((time.perf_counter() - start) / len(cases))
        start = time.perf_counter()
        for metric in self.metrics.values():
            metric.score(_drawn(cases, answers))
        fixed = took[1] + (time.perf_counter() - start) / len(cases)
        a_step = max(took[2] - took[1], 0.0) / 2 if several else 0.0
        return fixed - a_step if several else fixed, a_step

    def _missing(self, unit: Unit) -> int:
        return sum(not self.store.picture_path(unit.plan, case).exists() for case in unit.cases)

    def _draw(self, unit: Unit) -> Iterator[None]:
        """Draw the batches in which a picture is missing."""
        plan, kept = unit.plan, {case.id: self.store.picture(unit.plan, case) for case in unit.cases}
        todo = [batch for batch in unit.batches(self.run.batch_size) if any(kept[case.id] is None for case in batch)]
        if not todo:
            return
        method = self._loaded(plan)
        self.tell("drawn", f"{plan.name}, {unit.group}", 0)
        prepared = method.prepare(unit.cases[0].prepared_for)
        for batch in todo:
            for case in batch:
                self._check_same_weights(plan, method, kept[case.id])
            with Costs() as drawing:
                answers = method.draw(batch)
            made = Made(
                seconds=drawing.seconds / len(batch),
                memory_bytes=drawing.memory_bytes,
                prepared=prepared,
                model=method.model,
            )
            missing = [(case, answer) for case, answer in zip(batch, answers, strict=True) if kept[case.id] is None]
            for case, answer in missing:
                self.store.write_picture(plan, case, answer, made)
            self.tell("drawn", plan.name, len(missing))
            yield

    def _score(self, unit: Unit) -> None:
        """Apply the metrics that have not looked at the whole unit yet."""
        try:
            scores = self.store.scores(unit.plan, unit.group)
        except UserError as error:
            print(f"{error}; scoring them anew", file=sys.stderr)
            scores = {}
        wanted = {case.id for case in unit.cases}
        todo = {name: metric for name, metric in self.metrics.items() if set(scores.get(name, {})) != wanted}
        if not todo:
            return
        answers = []
        for case in unit.cases:
            made = self.store.picture(unit.plan, case)
            assert made is not None, f"{case.id} was drawn just now"
            answers.append(Answer(open_picture(self.store.picture_path(unit.plan, case)), made.boxes))
        drawn = _drawn(unit.cases, answers)
        for name, metric in todo.items():
            with self._holes(f"{unit.plan.name}, {unit.group}, metric {name}"):
                rows = metric.score(drawn)
                scores[name] = {case.id: row for case, row in zip(unit.cases, rows, strict=True)}
        self.store.write_scores(unit.plan, unit.group, scores)

    def _loaded(self, plan: MethodPlan) -> Method:
        if self._method[0] != plan.name:
            self._method = (plan.name, None)
            self._method = (plan.name, create(plan, self.run))
        method = self._method[1]
        if method is None:
            raise UserError("cannot be loaded (said above)")
        return method

    def _check_same_weights(self, plan: MethodPlan, method: Method, made: Made | None) -> None:
        if made is not None and made.model != method.model:
            raise UserError(
                f"{plan.name}: its weights changed since the first pictures were drawn; give another output= or remove "
                f"{self.store.picture_folder(plan)}"
            )

    @contextmanager
    def _holes(self, what: str) -> Iterator[None]:
        """What fails inside is told as a hole, and the run goes on; a mistake of ours with its traceback."""
        try:
            yield
        except UserError as error:
            self.tell("hole", f"{what}: {error}", 0)
        except Exception as error:
            traceback.print_exc()
            self.tell("hole", f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", 0)


def _drawn(cases: Sequence[Case], answers: Sequence[Answer]) -> list[Drawn]:
    return [Drawn(case, answer.picture, answer.boxes) for case, answer in zip(cases, answers, strict=True)]
