"""From the files of a run to `Results`: one row a picture, what is missing, what it was measured with."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import pandas
import yaml

from data_pipeline.errors import UserError
from data_pipeline.machine import processor_name
from infer.drawing import usable_device
from infer.evaluate.cases import Case
from infer.evaluate.class_drift import class_drift, load_measure
from infer.evaluate.methods import MethodPlan, plan_methods
from infer.evaluate.metrics import Column, load_metric
from infer.evaluate.results import MethodFacts, Results
from infer.evaluate.runner import Plan
from infer.evaluate.store import Made, Scores, Store
from infer.evaluate.work import Unit

LIBRARIES = ("torch", "diffusers", "transformers")


def gather(asked: Plan, holes: Sequence[str]) -> Results:
    """All that is stored of a plan and of the configuration's other methods; what was asked and is missing is a hole.

    Args:
        asked: what this call was about.
        holes: already known ones.
    """
    store, lines = Store(asked.run.output), [*asked.protocol.holes, *holes]
    known = {method.name for method in asked.methods}
    shown = [m for m in plan_methods(asked.run) if m.name in known or store.picture_folder(m).is_dir()]
    plan = replace(asked, methods=tuple(shown))
    columns, scored_by = _columns(plan, lines)
    rows, made = list[dict[str, Any]](), dict[str, list[list[Made]]]()
    for unit in plan.units():
        found = [(case, store.picture(unit.plan, case)) for case in unit.cases]
        there = [(case, one) for case, one in found if one is not None]
        if unit.cases[0].subjects:
            made.setdefault(unit.plan.name, []).append([one for _, one in there])
        scores = _scores(store, unit, len(there), scored_by, lines)
        rows += [_row(store, unit, case, one, scores) for case, one in there]
    drift = _class_drift(plan, store, lines)
    return Results(
        name=plan.run.name,
        folder=plan.run.output,
        table=pandas.DataFrame(rows).reindex(columns=[*_KEYS, *(column.name for column in columns)]),
        columns=tuple(columns),
        methods=tuple(_method_facts(method, made.get(method.name, [])) for method in plan.methods),
        references=_references(plan, store),
        holes=tuple(dict.fromkeys(lines)),
        class_drift=drift,
        facts=_facts(plan) | ({"class drift": f"KID by {load_measure(plan.run).backbone}"} if drift else {}),
        settings_yaml=yaml.safe_dump(plan.run.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
    )


def _method_facts(method: MethodPlan, by_group: Sequence[Sequence[Made]]) -> MethodFacts:
    """By group what is stored of a method; those of bare class words are none of these."""
    made = [one for group in by_group for one in group]
    models = {one.model for one in made}
    ready = [made[0].prepared for made in by_group if made]
    return MethodFacts(
        name=method.name,
        kind=method.kind,
        bound=method.bound,
        settings=method.resolved(),
        model=models.pop() if len(models) == 1 else "",  # a method that is tuned has one for each subject
        sweep=method.sweep,
        pictures_per_subject=median([one.pictures for one in ready] or [0]),
        seconds_per_subject=median([one.seconds for one in ready] or [0]),
        memory_per_subject=median([one.memory_bytes for one in ready] or [0]),
        bytes_per_subject=median([one.kept_bytes for one in ready] or [0]),
    )


def _scores(store: Store, unit: Unit, there: int, metrics: Sequence[str], lines: list[str]) -> Scores:
    """Stored scores of a unit, and lines about what is missing of it."""
    name = f"{unit.plan.name}, {unit.group}"
    if there < len(unit.cases):
        lines.append(f"{name}: {len(unit.cases) - there} of {len(unit.cases)} pictures are not drawn")
    try:
        scores = store.scores(unit.plan, unit.group)
    except UserError as error:
        lines.append(str(error))
        return {}
    lines += [f"{name}: not scored by {metric}" for metric in metrics if there and metric not in scores]
    return scores


_KEYS = ("method", "part", "group", "case", "prompt", "words", "kind", "seed", "picture", "seconds", "memory_bytes")


def _columns(plan: Plan, lines: list[str]) -> tuple[list[Column], list[str]]:
    """Columns and names of the metrics that can be loaded; the others are holes."""
    found, names = list[Column](), []
    for name in plan.run.metrics:
        try:
            found += load_metric(name, plan.run, plan.protocol).columns
            names.append(name)
        except UserError as error:
            lines.append(f"metric {name}: {error}")
    return found, names


def _row(store: Store, unit: Unit, case: Case, made: Made, scores: Scores) -> dict[str, Any]:
    row = {
        "method": unit.plan.name,
        "part": case.part,
        "group": case.group,
        "case": case.id,
        "prompt": case.prompt,
        "words": ", ".join(case.words),
        "kind": case.kind,
        "seed": case.seed,
        "picture": str(store.picture_path(unit.plan, case).relative_to(store.folder)),
        "seconds": made.seconds,
        "memory_bytes": made.memory_bytes,
    }
    for metric in scores.values():
        row |= metric.get(case.id, {})
    return row


def _class_drift(plan: Plan, store: Store, lines: list[str]) -> dict[str, float]:
    """KID of each method's class pictures; {} where it is not asked for or cannot be measured."""
    if not plan.run.class_drift.images:
        return {}
    drawn: dict[str, list[Path]] = {}
    for unit in plan.units():
        if unit.cases[0].part == "class":
            files = [store.picture_path(unit.plan, case) for case in unit.cases]
            drawn.setdefault(unit.plan.name, []).extend(file for file in files if file.exists())
    try:
        return class_drift(drawn, plan.run)
    except UserError as error:
        lines.append(str(error))
        return {}


def _references(plan: Plan, store: Store) -> dict[str, tuple[str, ...]]:
    """PNGs of what the methods were given, by group; a subject without a usable photo has none.

    Where methods are tuned, the pictures that one subject was tuned with stand beside its cut-out; two have no room.
    """
    found, tuned = {}, any(method.kind == "refined" for method in plan.methods)
    for cases in plan.protocol.groups():
        try:
            cutouts = [cutout for subject in cases[0].subjects for cutout in subject.cutouts]
        except UserError:
            cutouts = []
        if tuned and len(cases[0].subjects) == 1:
            cutouts += [photo.open() for photo in cases[0].subjects[0].tuning]
        found[cases[0].group] = tuple(store.write_reference(cases[0].group, i, c) for i, c in enumerate(cutouts))
    return found


def _facts(plan: Plan) -> dict[str, str]:
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": usable_device(plan.run.device),
        "processor": processor_name(),
        "threads": f"{plan.run.threads} a process",
        "precision": plan.run.precision,
        "batch": f"{plan.run.batch_size} pictures of a group at once",
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }
