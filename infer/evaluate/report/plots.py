"""The plots of a report as SVG: trade-off, time, prompt kinds, differences. Sweeps are drawn by `curves.py`.

Whiskers are 95 % bootstrap intervals over subjects; names stand beside their marks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from infer.evaluate.cases import KINDS
from infer.evaluate.intervals import Comparison, Estimate, estimate_column
from infer.evaluate.metrics import Column
from infer.evaluate.report import wording
from infer.evaluate.report.canvas import (
    SMALL,
    WIDTH,
    Drawing,
    Label,
    Rectangle,
    Scale,
    place_labels,
    shortened,
    text_width,
)
from infer.evaluate.report.tables import PartTable, Row, of_role

LEFT, RIGHT, TOP, BOTTOM = 52.0, WIDTH - 10.0, 30.0, 324.0
NAMES_OF_LEVELS = 130.0  # the widest that a name beside a level may be
MANY = 7  # points with their names beside them; more are numbered, and named below


@dataclass(frozen=True)
class Figure:
    """A drawing and what is said below it."""

    svg: str
    caption: str
    key: tuple[tuple[int, Row], ...] = ()  # names of numbered points


def trade_off(table: PartTable) -> list[Figure]:
    """Subject score against prompt score, then closer, without the bounds; [] where one of them was not measured."""
    subject, prompt = of_role(table.columns, "subject"), of_role(table.columns, "prompt")
    if subject is None or prompt is None:
        return []
    said = f"{subject.label} tells the subject, {prompt.label} the text: up and right is better."
    figures = [_trade_off(table, table.rows, subject, prompt, f"{table.title}: {said} Hollow grey marks are bounds.")]
    if len(table.contenders) > 2 and table.bounds:
        closer = f"{table.title}, contenders only: the same points, closer."
        figures.append(_trade_off(table, table.contenders, subject, prompt, closer))
    return figures


def _trade_off(table: PartTable, rows: Sequence[Row], subject: Column, prompt: Column, caption: str) -> Figure:
    drawing = Drawing(372, f"{table.title}: {subject.label} against {prompt.label}")
    points = [_Point(row, row.estimates[prompt.name], row.estimates[subject.name]) for row in rows]
    points = [point for point in points if point.x.known and point.y.known]
    across = Scale.around([end for point in points for end in point.x.ends], LEFT, RIGHT)
    up = Scale.around([end for point in points for end in point.y.ends], BOTTOM, TOP)
    drawing.axis_below(across, BOTTOM, TOP)
    drawing.axis_left(up, LEFT, RIGHT)
    drawing.text(2, 11, _axis(subject), "axis")
    drawing.text(RIGHT, BOTTOM + 34, _axis(prompt), "axis", "end")
    tips = [
        f"{p.row.name}: {subject.label} {wording.with_spread(p.y)}, {prompt.label} {wording.with_spread(p.x)}"
        for p in points
    ]
    _points(drawing, points, _names(table, len(points)), across, up, tips, [])
    return Figure(drawing.svg(), caption, _key(table, [point.row for point in points]))


def time_against_score(table: PartTable) -> Figure | None:
    """Seconds a picture on a log axis against the subject score; bounds that draw nothing are levels."""
    subject = of_role(table.columns, "subject")
    if subject is None:
        return None
    rows = [row for row in table.rows if row.pictures and row.estimates[subject.name].known]
    levels = [row for row in rows if row.facts.bound and not row.facts.model]
    drawn = [row for row in rows if row not in levels]
    drawing = Drawing(372, f"{table.title}: seconds a picture against {subject.label}")
    names = _names(table, len(rows))
    room = min(max((text_width(names[row.name], SMALL) for row in levels), default=-14.0), NAMES_OF_LEVELS) + 14
    across = Scale.around_log([row.seconds for row in drawn], LEFT, RIGHT - room)
    up = Scale.around([end for row in rows for end in row.estimates[subject.name].ends], BOTTOM, TOP)
    drawing.axis_below(across, BOTTOM, TOP, [wording.seconds(tick) for tick in across.ticks()])
    drawing.axis_left(up, LEFT, across.end)
    drawing.text(2, 11, _axis(subject), "axis")
    drawing.text(across.end, BOTTOM + 34, "time of a picture ↓", "axis", "end")
    taken = _levels(drawing, [(names[row.name], up(row.estimates[subject.name].mean)) for row in levels], across.end)
    points = []
    for row in drawn:
        points.append(_Point(row, Estimate(row.seconds, row.seconds, row.seconds, 1), row.estimates[subject.name]))
    tips = [f"{p.row.name}: {wording.seconds(p.x.mean)}, {subject.label} {wording.with_spread(p.y)}" for p in points]
    _points(drawing, points, names, across, up, tips, taken)
    said = f"{table.title}. Time of a picture within its batch, on a log axis: up and left is better."
    return Figure(
        drawing.svg(), said + (" Dashed levels are bounds that draw nothing." if levels else ""), _key(table, rows)
    )


@dataclass(frozen=True)
class _Point:
    row: Row
    x: Estimate
    y: Estimate


def _names(table: PartTable, count: int) -> dict[str, str]:
    """What stands in a plot of `count` methods for each: its name, or its number in the table if they are many."""
    return {row.name: str(number) if count > MANY else row.name for number, row in enumerate(table.rows, 1)}


def _key(table: PartTable, rows: Sequence[Row]) -> tuple[tuple[int, Row], ...]:
    """Numbers and rows, where `_names` gave numbers."""
    return tuple((number, row) for number, row in enumerate(table.rows, 1) if row in rows) if len(rows) > MANY else ()


def _points(
    drawing: Drawing,
    points: Sequence[_Point],
    names: dict[str, str],
    across: Scale,
    up: Scale,
    tips: Sequence[str],
    taken: list[Rectangle],
) -> None:
    """Whiskers, marks and names; `taken` is where names had better not stand."""
    for point in points:
        _whisker(drawing, point, across, up, taken)
    # Contenders over bounds, so that a bound does not hide one.
    for point, tip in sorted(zip(points, tips, strict=True), key=lambda pair: not pair[0].row.facts.bound):
        drawing.mark(across(point.x.mean), up(point.y.mean), point.row.look, tip)
    labels = [Label(across(p.x.mean), up(p.y.mean), names[p.row.name], p.row.look.colour) for p in points]
    place_labels(drawing, labels, taken, (LEFT + 2, TOP - 6, across.end + 4, BOTTOM))


def by_kind(table: PartTable, column: Column) -> Figure:
    """Bars of every method for each kind of prompt."""
    rows = [row for row in table.rows if row.pictures]
    names = _names(table, len(rows))
    kinds = [kind for kind in KINDS if any((row.table["kind"] == kind).any() for row in rows)]
    bars = {
        kind: [(row, estimate_column(row.table[row.table["kind"] == kind], column.name)) for row in rows]
        for kind in kinds
    }
    start = min(max((text_width(names[row.name], SMALL) for row in rows), default=60.0) + 8, 150.0)
    step, head = (15.0 if len(rows) > MANY else 19.0), 26.0
    bottom = 22 + sum(head + step * len(found) for found in bars.values())
    drawing = Drawing(bottom + 26, f"{table.title}: {column.label} by kind of prompt")
    ends = [end for found in bars.values() for _, estimate in found for end in estimate.ends if isfinite(end)]
    across = Scale(min([0.0, *ends]), max([0.0, *ends]) * 1.02 or 1.0, start + 4, WIDTH - 52.0)
    drawing.text(2, 9, _axis(column), "axis")
    drawing.axis_below(across, bottom, 22)
    y = 22.0
    for kind, found in bars.items():
        drawing.text(2, y + 15, kind, "heading")
        y += head
        for row, estimate in found:
            drawing.text(start, y + step / 2, shortened(names[row.name], start - 4, SMALL), "small", "end")
            _bar(drawing, row, estimate, across, y + step / 2, step - 7)
            y += step
    absent = [row.name for row in table.rows if not row.pictures]
    said = f" Without pictures here: {wording.listed(absent)}." if absent else ""
    return Figure(drawing.svg(), f"{table.title}, {column.label} by kind of prompt.{said}", _key(table, rows))


def difference_glyph(comparison: Comparison, reach: float) -> str:
    """An interval around zero, as wide as a cell of a table; `reach` is the largest value of the column's cells."""
    drawing = Drawing(14, "interval of the difference", 96)
    across = Scale(-reach, reach, 3, 93)
    drawing.line(across(0), 1, across(0), 13, "zero")
    low, high = comparison.difference.ends
    drawing.line(across(low), 7, across(high), 7, "interval")
    drawing.add("circle", cx=across(comparison.difference.mean), cy=7, r=3.2, class_="middle")
    return drawing.svg()


def swatch(row: Row) -> str:
    """The mark of a method, for tables."""
    drawing = Drawing(14, row.name, 14)
    drawing.mark(7, 7, row.look, radius=4.6)
    return drawing.svg().replace(' role="img"', ' aria-hidden="true" class="swatch"', 1)


def _axis(column: Column) -> str:
    return f"{column.label} {wording.ARROWS[column.better]}".strip()


def _levels(drawing: Drawing, levels: Sequence[tuple[str, float]], end: float) -> list[Rectangle]:
    """Dashed lines up to `end` and their names behind it, spread where lines are close; what the lines cover."""
    taken, free = list[Rectangle](), -1e9
    for name, y in sorted(levels, key=lambda level: level[1]):
        place = max(y, free)
        drawing.line(LEFT, y, end, y, "level")
        drawing.line(end, y, end + 11, place, "leader")
        drawing.text(end + 14, place, shortened(name, NAMES_OF_LEVELS, SMALL), "small")
        taken.append((LEFT, y - 1, end, y + 1))
        free = place + 15
    return taken


def _whisker(drawing: Drawing, point: _Point, across: Scale, up: Scale, taken: list[Rectangle]) -> None:
    """Intervals in both directions; what they and the mark cover is added to `taken`."""
    style = f"whisker {point.row.look.colour}"
    left, right = (across(end) for end in point.x.ends)
    low, high = (up(end) for end in point.y.ends)
    middle, level = across(point.x.mean), up(point.y.mean)
    if right > left:
        drawing.line(left, level, right, level, style)
    if low > high:
        drawing.line(middle, low, middle, high, style)
    taken += [(left, level - 1, right, level + 1), (middle - 1, high, middle + 1, low)]
    taken.append((middle - 7, level - 7, middle + 7, level + 7))


def _bar(drawing: Drawing, row: Row, estimate: Estimate, across: Scale, y: float, height: float) -> None:
    if not estimate.known:
        drawing.text(across(0) + 5, y, wording.NONE, "small")
        return
    left, right = sorted((across(0), across(estimate.mean)))
    width = max(right - left, 0.5)
    drawing.add("rect", x=left, y=y - height / 2, width=width, height=height, class_=f"bar {row.look.colour}")
    low, high = (across(end) for end in estimate.ends)
    drawing.line(low, y, high, y, "over")
    drawing.text(WIDTH - 2, y, wording.score(estimate.mean), "small", "end")
