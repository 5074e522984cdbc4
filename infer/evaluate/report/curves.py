"""Sweeps as curves: both axes' scores over one setting; values without an order are points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from infer.evaluate.intervals import Estimate, estimate_column
from infer.evaluate.metrics import Column
from infer.evaluate.report import wording
from infer.evaluate.report.canvas import WIDTH, Drawing, Scale, shortened, text_width
from infer.evaluate.report.plots import Figure
from infer.evaluate.report.tables import PARTS, Look, looks, of_role, shown_methods
from infer.evaluate.results import MethodFacts, Results

LEFT, RIGHT, PANEL = 52.0, WIDTH - 14.0, 150.0
LOG_FROM = 16  # times the smallest value: from there on small ones would stand on one another


@dataclass(frozen=True)
class _Sweep:
    """One setting at several values."""

    title: str
    key: str
    methods: tuple[MethodFacts, ...]  # in the order in which they are shown

    @property
    def values(self) -> list[Any]:
        return [method.sweep[2] for method in self.methods if method.sweep]

    @property
    def ordered(self) -> bool:
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)


def sweep_figures(results: Results) -> list[Figure]:
    """A figure a sweep."""
    by_title: dict[str, list[MethodFacts]] = {}
    for method in results.methods:
        if method.sweep:
            by_title.setdefault(method.sweep[0], []).append(method)
    figures = []
    for title, methods in by_title.items():
        sweep = _Sweep(title, methods[0].sweep[1] if methods[0].sweep else "", tuple(methods))
        if sweep.ordered:
            methods.sort(key=lambda method: method.sweep[2] if method.sweep else 0)
            sweep = _Sweep(sweep.title, sweep.key, tuple(methods))
        figures.append(_figure(results, sweep))
    return figures


def _figure(results: Results, sweep: _Sweep) -> Figure:
    columns = [c for role in ("subject", "prompt") if (c := of_role(results.columns, role))]
    height = 4 + 14 * _lines(sweep) + len(columns) * (PANEL + 40)
    drawing = Drawing(height, f"{sweep.title}: {' and '.join(column.label for column in columns)}")
    drawing.text(2, 11, sweep.title, "heading")
    across = _across(sweep)
    parts = [part for part in PARTS if (results.table["part"] == part).any()]
    curves = {part: _estimates(results, sweep, part, columns) for part in parts}
    curves = {part: found for part, found in curves.items() if any(e.known for row in found for e in row)}
    swept = _swept(results, sweep)
    default = swept.settings.get(sweep.key) if swept else None
    colour = looks(results)[swept.name].colour if swept else "c0"
    marks = {"single": Look(colour, "circle"), "pair": Look(f"{colour} second", "square")}
    for number, column in enumerate(columns):
        top = 56 + number * (PANEL + 40)
        ends = [end for found in curves.values() for row in found for end in row[number].ends]
        up = Scale.around(ends, top + PANEL - 22, top)
        drawing.text(2, top - 18, f"{column.label} {wording.ARROWS[column.better]}".strip(), "axis")
        drawing.axis_left(up, LEFT, RIGHT)
        _values_below(drawing, sweep, across, top, default)
        for part, found in curves.items():
            beside = 0 if sweep.ordered or len(curves) == 1 else 4 if part == "pair" else -4
            places = {i: x + beside for i, x in across.items()}
            _curve(drawing, sweep, places, up, [row[number] for row in found], marks[part])
    _legend(drawing, {part: marks[part] for part in curves})
    groups = max((e.groups for found in curves.values() for row in found for e in row), default=0)
    said = f"over the first {wording.count(groups, 'subject')} (or pairs) only." if groups else "nothing was drawn."
    marked = (
        f" The dashed line is the value in the tables ({wording.value_word(default)})." if default is not None else ""
    )
    return Figure(drawing.svg(), f"Setting {sweep.key}, {said}{marked}")


def _across(sweep: _Sweep) -> dict[int, float]:
    """Where each value stands: by its size, or side by side."""
    values = sweep.values
    if sweep.ordered:
        log = min(values) > 0 and max(values) >= LOG_FROM * min(values)
        scale = Scale(min(values), max(values), LEFT + 16, RIGHT - 16, log)
        return {i: scale(value) for i, value in enumerate(values)}
    step = (RIGHT - LEFT) / len(values)
    return {i: LEFT + step * (i + 0.5) for i in range(len(values))}


def _estimates(results: Results, sweep: _Sweep, part: str, columns: Sequence[Column]) -> list[list[Estimate]]:
    """For each value, one estimate a column."""
    table = results.table[results.table["part"] == part]
    own = [table[table["method"] == method.name] for method in sweep.methods]
    return [[estimate_column(rows, column.name) for column in columns] for rows in own]


def _swept(results: Results, sweep: _Sweep) -> MethodFacts | None:
    """The row of the tables that differs from the values of the sweep by nothing but that setting."""
    rest = {key: value for key, value in sweep.methods[0].settings.items() if key != sweep.key}
    for method in shown_methods(results):
        if {key: value for key, value in method.settings.items() if key != sweep.key} == rest and not method.bound:
            return method
    return None


def _room(sweep: _Sweep) -> float:
    """Width of the label of a value."""
    return (RIGHT - LEFT) / len(sweep.values) - 4


def _lines(sweep: _Sweep) -> int:
    """How many lines the labels of the values take."""
    return 2 if any(text_width(wording.value_word(value), 12) > _room(sweep) for value in sweep.values) else 1


def _values_below(drawing: Drawing, sweep: _Sweep, across: dict[int, float], top: float, default: Any) -> None:
    """Labels of the values, on two lines if they are long; one that would touch another is left out."""
    bottom, free = top + PANEL - 22, [0.0, 0.0]
    room = _room(sweep)
    lines = _lines(sweep)
    for i, value in enumerate(sweep.values):
        x = across[i]
        style = "now" if value == default else "grid"
        drawing.line(x, top, x, bottom, style)
        text = shortened(wording.value_word(value), lines * room, 12)
        line, half = i % lines, text_width(text, 12) / 2
        if x - half > free[line]:
            drawing.text(x, bottom + 13 + 14 * line, text, "tick", "middle")
            free[line] = x + half + 4


def _curve(
    drawing: Drawing, sweep: _Sweep, across: dict[int, float], up: Scale, row: Sequence[Estimate], look: Look
) -> None:
    known = [(across[i], estimate, i) for i, estimate in enumerate(row) if estimate.known]
    if sweep.ordered and len(known) > 1:
        points = " ".join(f"{x:.1f},{up(estimate.mean):.1f}" for x, estimate, _ in known)
        drawing.add("polyline", points=points, class_=f"curve {look.colour}")
    for x, estimate, i in known:
        low, high = estimate.ends
        drawing.line(x, up(low), x, up(high), f"whisker {look.colour}")
        tip = f"{sweep.key} {wording.value_word(sweep.values[i])}: {wording.with_spread(estimate)}"
        drawing.mark(x, up(estimate.mean), look, tip, 4.5)


def _legend(drawing: Drawing, marks: dict[str, Look]) -> None:
    """Which part is which, beside the name of the first axis; one part needs none."""
    x = RIGHT
    for part in reversed(marks) if len(marks) > 1 else ():
        text = PARTS[part].lower()
        x -= text_width(text, 12)
        drawing.text(x, 38, text, "small")
        drawing.mark(x - 10, 38, marks[part], radius=4.5)
        x -= 28
