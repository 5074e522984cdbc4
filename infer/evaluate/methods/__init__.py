"""Methods: who answers. One file each, of one shape; a new method is one more file and one more line in `KINDS`.

BOUND                       whether it limits what others can reach, rather than compete
MethodSettings              its settings, all that decides its pictures
answers(case, settings)     whether it has an answer to cases of this sort; nothing is loaded for that
create(settings, run)       loads a `Method`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.settings import Settings, settings_of
from infer.evaluate.cases import Case, EvaluatedSubject
from infer.evaluate.settings import EvaluateSettings
from infer.subjects import Box

KINDS = {
    "zero_shot": "infer.evaluate.methods.zero_shot",
    "plain_base": "infer.evaluate.methods.plain_base",
    "copied_reference": "infer.evaluate.methods.copied_reference",
    "real_render": "infer.evaluate.methods.real_render",
    "refined": "infer.evaluate.methods.refined",
}


@dataclass(frozen=True)
class Answer:
    """A picture, and where its subjects stand as far as the method knows (fractions)."""

    picture: Image.Image  # RGB
    boxes: tuple[Box, ...] | None = None


@dataclass(frozen=True)
class Prepared:
    """What a method needed to get ready for its subjects, a subject; maybe in a run before this one."""

    pictures: int = 0  # of the subject that it sees
    seconds: float = 0.0
    memory_bytes: int = 0  # at the peak
    kept_bytes: int = 0  # on disk, of the subject


class Method(Protocol):
    """Answers cases with pictures; the same case always with the same one."""

    model: str  # fingerprint of the weights that it draws with now; "" without any

    def prepare(self, subjects: Sequence[EvaluatedSubject]) -> Prepared:
        """Get ready to draw these subjects (tune, encode); may change `model`."""
        ...

    def draw(self, cases: Sequence[Case]) -> list[Answer]:
        """Answer cases of one group at once, in their order."""
        ...


@dataclass(frozen=True)
class MethodPlan:
    """A row of the tables, or one value of a sweep."""

    name: str
    kind: str
    bound: bool  # limits what a contender can reach
    settings: Settings  # all that decides its pictures
    sweep: tuple[str, str, Any] | None = None  # sweep's name, key, value
    groups: int | None = None  # only the first so many of each part; None: all
    class_words: bool = False  # whether it draws bare class words: contenders, and what they are compared with

    def answers(self, case: Case) -> bool:
        """Whether the method has an answer to cases of this sort."""
        if case.part == "class" and not self.class_words:
            return False
        return bool(import_module(KINDS[self.kind]).answers(case, self.settings))

    def resolved(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return {"kind": self.kind, **self.settings.model_dump(mode="json")}


def plan_methods(run: EvaluateSettings) -> list[MethodPlan]:
    """Every method of a configuration, then the values of its sweeps; settings are checked, nothing is loaded.

    Raises:
        UserError: an unknown kind, key or value.
    """
    plans = [_plan(name, values, f"methods.{name}") for name, values in run.methods.items()]
    plans = [replace(plan, class_words=not plan.bound or plan.name == run.class_drift.against) for plan in plans]
    for title, sweep in run.sweeps.items():
        for value in sweep.values:
            source = f"sweeps.{title}"
            values = {**run.methods[sweep.method], sweep.key: value}
            plan = _plan(f"{sweep.method}, {sweep.key} {value}", values, source)
            plans.append(
                MethodPlan(plan.name, plan.kind, False, plan.settings, (title, sweep.key, value), sweep.groups)
            )
    return plans


def create(plan: MethodPlan, run: EvaluateSettings) -> Method:
    """Load a method.

    Raises:
        UserError: its weights cannot be had.
    """
    method: Method = import_module(KINDS[plan.kind]).create(plan.settings, run)
    return method


def _plan(name: str, values: dict[str, Any], source: str) -> MethodPlan:
    """`kind` picks the file, `config` names files whose keys come first, `bound` makes a row a bound or a contender
    against its kind's habit; the rest are the kind's own settings."""
    rest = dict(values)
    kind, config, bound = rest.pop("kind", None), rest.pop("config", ()), rest.pop("bound", None)
    if kind not in KINDS:
        raise UserError(f"{source}.kind={kind!r}: no such kind of method; expected one of {', '.join(KINDS)}")
    module = import_module(KINDS[kind])
    files = [Path(file) for file in ([config] if isinstance(config, str) else config)]
    if not isinstance(bound, bool | None):
        raise UserError(f"{source}.bound={bound!r}: expected true or false")
    bound = module.BOUND if bound is None else bound
    return MethodPlan(name, kind, bound, settings_of(module.MethodSettings, rest, source, files))
