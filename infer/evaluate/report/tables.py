"""The tables of a report: one a part (one subject, two), contenders first, bounds apart; paired differences; Markdown.

A row of the configuration is a row of the table even if nothing of it was drawn: what is missing is a dash and a mark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import nan

from pandas import DataFrame

from infer.evaluate.intervals import Comparison, Estimate, compare, estimate_column
from infer.evaluate.metrics import Column
from infer.evaluate.report import wording
from infer.evaluate.results import MethodFacts, Results

PARTS = {"single": "One subject", "pair": "Two subjects"}
COLOURS, SHAPES = 8, ("circle", "square", "triangle")
BOUND_SHAPES = ("diamond", "triangle", "square", "cross", "wedge")


@dataclass(frozen=True)
class Look:
    """How a method is marked in every plot and table."""

    colour: str  # class of the style sheet: c0 … c7 for contenders, cb for bounds
    shape: str


@dataclass(frozen=True, eq=False)
class Row:
    """A method in the table of a part."""

    facts: MethodFacts
    look: Look
    table: DataFrame  # its pictures in this part
    estimates: dict[str, Estimate]  # by column
    asked: int  # pictures that some method has here
    holes: tuple[str, ...]  # lines about this method

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def pictures(self) -> int:
        return len(self.table)

    @property
    def seconds(self) -> float:
        """Of a picture, mean."""
        return float(self.table["seconds"].mean()) if self.pictures else nan

    @property
    def memory(self) -> float:
        """Bytes at the peak."""
        return float(self.table["memory_bytes"].max()) if self.pictures else nan

    @property
    def costs(self) -> tuple[str, ...]:
        """In the order of `COSTS`."""
        if not self.pictures:
            return (wording.NONE,) * len(COSTS)
        facts = self.facts
        drawing = (wording.seconds(self.seconds), wording.size(self.memory), f"{facts.pictures_per_subject:g}")
        told = ((wording.seconds, facts.seconds_per_subject), (wording.size, facts.memory_per_subject))
        tuning = (*told, (wording.size, facts.bytes_per_subject))
        return *drawing, *(say(value) if value else wording.NONE for say, value in tuning)

    @property
    def missing(self) -> str:
        """What is not there, in words; empty if nothing is missing."""
        if self.pictures:
            return "" if self.pictures == self.asked else f"{self.pictures:,} of {self.asked:,} pictures"
        if self.holes:
            return "hole: nothing was drawn"
        return "has no answer here" if self.asked else "nothing was drawn"


HOLES_AT_ONCE = 10  # lines; the page folds the rest away
COSTS = ("s a picture", "peak memory", "photos seen", "tuning a subject", "its peak memory", "its file")


@dataclass(frozen=True, eq=False)
class PartTable:
    """One part of the protocol, all methods."""

    part: str
    columns: tuple[Column, ...]  # that have a number here
    unmeasured: tuple[Column, ...]  # that have none
    rows: tuple[Row, ...]
    groups: int

    @property
    def title(self) -> str:
        return PARTS[self.part]

    @property
    def thing(self) -> str:
        """What a group is called here."""
        return "pair" if self.part == "pair" else "subject"

    @cached_property
    def contenders(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.facts.bound)

    @cached_property
    def bounds(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.facts.bound)

    @cached_property
    def best(self) -> dict[str, str]:
        """Column: name of the contender with the best mean."""
        found = {}
        for column in self.columns:
            known = [
                (row.estimates[column.name].mean, row) for row in self.contenders if row.estimates[column.name].known
            ]
            if known and column.better:
                choose = min if column.better == "lower" else max
                found[column.name] = choose(known, key=lambda pair: pair[0])[1].name
        return found

    @property
    def size(self) -> str:
        """`40 subjects, 160 pictures of each method`."""
        asked = self.rows[0].asked if self.rows else 0
        return f"{wording.count(self.groups, self.thing)}, {wording.count(asked, 'picture')} of each method"


def of_role(columns: Sequence[Column], role: str) -> Column | None:
    """The column that stands on an axis: the first of that role."""
    return next((column for column in columns if column.role == role), None)


def shown_methods(results: Results) -> list[MethodFacts]:
    """Rows of their own; values of sweeps have their curves."""
    return [method for method in results.methods if method.sweep is None]


def looks(results: Results) -> dict[str, Look]:
    """Colour and shape of each row, the same all over the report."""
    found, contenders, bounds = dict[str, Look](), 0, 0
    for method in shown_methods(results):
        if method.bound:
            found[method.name] = Look("cb", BOUND_SHAPES[bounds % len(BOUND_SHAPES)])
            bounds += 1
        else:
            found[method.name] = Look(f"c{contenders % COLOURS}", SHAPES[contenders // COLOURS % len(SHAPES)])
            contenders += 1
    return found


def holes_by_method(results: Results) -> dict[str, tuple[str, ...]]:
    """Lines about what is missing, by the method that they begin with; "" holds the others."""
    found: dict[str, list[str]] = {}
    names = sorted((method.name for method in results.methods), key=len, reverse=True)  # "ours, steps 10" before "ours"
    for line in results.holes:
        owner = next((name for name in names if line.startswith((f"{name}, ", f"{name}: "))), "")
        found.setdefault(owner, []).append(line)
    return {name: tuple(lines) for name, lines in found.items()}


def part_tables(results: Results) -> list[PartTable]:
    """One table for each part that was drawn; the first part's if nothing was."""
    drawn = set(results.table["part"])
    return [_part_table(results, part) for part in PARTS if part in drawn] or [_part_table(results, "single")]


def _part_table(results: Results, part: str) -> PartTable:
    methods, look, holes = shown_methods(results), looks(results), holes_by_method(results)
    table = results.table[results.table["part"] == part]
    table = table[table["method"].isin([method.name for method in methods])]
    measured = [column for column in results.columns if table[column.name].notna().any()]
    rows = []
    for method in methods:
        own = table[table["method"] == method.name]
        estimates = {column.name: estimate_column(own, column.name) for column in measured}
        rows.append(Row(method, look[method.name], own, estimates, table["case"].nunique(), holes.get(method.name, ())))
    unmeasured = tuple(column for column in results.columns if column not in measured)
    return PartTable(part, tuple(measured), unmeasured, tuple(rows), table["group"].nunique())


def differences(table: PartTable) -> dict[str, dict[str, Comparison]]:
    """Every other row minus the first one, by row and column; {} where the first one has nothing, or no number."""
    if not table.rows or not table.rows[0].pictures or not table.columns:
        return {}
    first = table.rows[0]
    return {
        row.name: {c.name: compare(row.table, first.table, c.name, c.better) for c in table.columns}
        for row in table.rows[1:]
    }


def as_markdown(results: Results) -> str:
    """Tables for a README: one a part, the best contender bold."""
    lines = [f"# {_plain(results.name)}", ""]
    for table in part_tables(results):
        lines += _markdown_part(table)
    if results.class_drift:
        lines += ["## Class drift", "", "| | KID ↓ |", "|---|---:|"]
        lines += [f"| {_plain(name)} | {wording.drift(value)} |" for name, value in results.class_drift.items()] + [""]
    if results.holes:
        lines += ["## Holes", "", *(f"- {_plain(hole)}" for hole in results.holes[:HOLES_AT_ONCE])]
        lines += [f"- {more:,} more, listed in report.html"] if (more := len(results.holes) - HOLES_AT_ONCE) > 0 else []
        lines.append("")
    facts = ", ".join(f"{key} {value}" for key, value in results.facts.items())
    return "\n".join([*lines, *([_plain(facts), ""] if facts else [])])


def _markdown_part(table: PartTable) -> list[str]:
    headings = [f"{c.label} {wording.ARROWS[c.better]}".strip() for c in table.columns]
    headings += [f"{name} ↓" for name in COSTS]
    lines = [
        f"## {table.title}",
        "",
        f"{table.size}. Mean ± half of the 95 % bootstrap interval over {table.thing}s.",
        "",
    ]
    lines += [f"| | {' | '.join(map(_plain, headings))} |", "|---" + "|---:" * len(headings) + "|"]
    for row in (*table.contenders, *table.bounds):
        cells = [_markdown_cell(table, row, column) for column in table.columns]
        name = f"*{_plain(row.name)}* (bound)" if row.facts.bound else _plain(row.name)
        name += f" ({row.missing})" if row.missing else ""
        lines.append(f"| {name} | {' | '.join([*cells, *row.costs])} |")
    measured = [f"{c.label}: {c.backbone}" for c in table.columns if c.backbone]
    return [*lines, "", *([f"Measured with {_plain('; '.join(measured))}.", ""] if measured else [])]


def _markdown_cell(table: PartTable, row: Row, column: Column) -> str:
    text = wording.with_spread(row.estimates[column.name])
    return f"**{text}**" if table.best.get(column.name) == row.name else text


def _plain(text: str) -> str:
    """A text that Markdown shows as it is, on one line."""
    for mark in ("\\", "|", "*", "_", "`", "<", "["):
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
