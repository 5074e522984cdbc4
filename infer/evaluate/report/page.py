"""From `Results` to the files of a report: gathers what the templates show, and writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from data_pipeline.errors import UserError
from infer.evaluate.intervals import Comparison
from infer.evaluate.metrics import Column
from infer.evaluate.report import wording
from infer.evaluate.report.curves import sweep_figures
from infer.evaluate.report.plots import Figure, by_kind, difference_glyph, swatch, time_against_score, trade_off
from infer.evaluate.report.sheets import extremes, open_album, sheets
from infer.evaluate.report.tables import (
    COSTS,
    HOLES_AT_ONCE,
    PartTable,
    Row,
    as_markdown,
    differences,
    holes_by_method,
    of_role,
    part_tables,
)
from infer.evaluate.results import Results

KEYS = ("method", "part", "kind", "group", "prompt", "seed")  # of the per-image page, before the metrics


def write_report(results: Results) -> list[Path]:
    """Write the report into the run's folder, in place of an older one.

    Returns:
        report.html, report.md, images.html, scores.parquet.
    Raises:
        UserError: the folder cannot be written.
    """
    table = BytesIO()
    results.table.to_parquet(table, index=False)
    contents = {
        "report.html": _report_page(results).encode(),
        "report.md": as_markdown(results).encode(),
        "images.html": _images_page(results).encode(),
        "scores.parquet": table.getvalue(),
    }
    written = []
    for name, content in contents.items():
        path = results.folder / name
        try:
            path.write_bytes(content)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); free the disk, then use --report"
            ) from error
        written.append(path)
    return written


@dataclass(frozen=True)
class _Difference:
    """A cell of the table of differences."""

    comparison: Comparison
    glyph: str
    verdict: str  # better | worse | "" where it is not clear


def _environment() -> Environment:
    templates = Environment(
        loader=PackageLoader("infer.evaluate.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals.update(wording=wording, swatch=swatch, costs=COSTS, holes_at_once=HOLES_AT_ONCE)
    return templates


def _report_page(results: Results) -> str:
    tables = part_tables(results)
    album = open_album(results, tables)
    cases = [(table, found) for table in tables if (found := extremes(results, table, album))]
    holes = holes_by_method(results)
    settings = yaml.safe_load(results.settings_yaml) or {}
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            results=results,
            tables=tables,
            leads={table.part: _leads(table) for table in tables},
            sheets=sheets(results, tables, album),
            trade_offs=[figure for table in tables for figure in trade_off(table)],
            times=[figure for table in tables if (figure := time_against_score(table))],
            kinds=_kind_figures(tables),
            differences={table.part: _difference_cells(table) for table in tables},
            sweeps=sweep_figures(results),
            cases=cases,
            holes=holes,
            drift_against=settings.get("class_drift", {}).get("against", ""),
            drift_pictures=int((results.table["part"] == "class").sum()),
        )
    )


@dataclass(frozen=True)
class _Lead:
    """What a table says of one axis, in a sentence."""

    axis: str
    column: Column
    row: Row
    bounds: tuple[Row, ...]  # from the lowest


def _leads(table: PartTable) -> list[_Lead]:
    """The best contender on each axis, beside the bounds."""
    found = []
    for role in ("subject", "prompt"):
        column = of_role(table.columns, role)
        best = column and next((row for row in table.contenders if row.name == table.best.get(column.name)), None)
        if not column or not best:
            continue
        known = [row for row in table.bounds if row.estimates[column.name].known]
        known.sort(key=lambda row: row.estimates[column.name].mean)
        found.append(_Lead("Text" if role == "prompt" else "Subject", column, best, tuple(known)))
    return found


def _kind_figures(tables: Sequence[PartTable]) -> list[Figure]:
    columns = [(table, of_role(table.columns, role)) for table in tables for role in ("subject", "prompt")]
    return [by_kind(table, column) for table, column in columns if column]


def _difference_cells(table: PartTable) -> dict[str, dict[str, _Difference]]:
    """By row and column, with glyphs of one scale a column."""
    found = differences(table)
    reach = {
        column.name: max(
            (abs(end) for row in found.values() for end in row[column.name].difference.ends if isfinite(end)),
            default=0.0,
        )
        or 1.0
        for column in table.columns
    }
    return {
        name: {
            column.name: _Difference(
                row[column.name],
                difference_glyph(row[column.name], reach[column.name]) if row[column.name].difference.known else "",
                _verdict(row[column.name], column),
            )
            for column in table.columns
        }
        for name, row in found.items()
    }


def _verdict(comparison: Comparison, column: Column) -> str:
    if not comparison.clear or not column.better:
        return ""
    return "better" if (comparison.difference.mean > 0) == (column.better == "higher") else "worse"


def _images_page(results: Results) -> str:
    """All rows as data for the page's script."""
    numbers = [{"name": c.name, "label": c.label, "better": c.better, "meaning": c.meaning} for c in results.columns]
    numbers.append({"name": "seconds", "label": "seconds", "better": "lower", "meaning": "Of the picture."})
    names = [*KEYS, "picture", *(number["name"] for number in numbers)]
    rows = [[_json_value(value) for value in row] for row in results.table[names].itertuples(index=False)]
    for row in rows:
        row[len(KEYS)] = quote(str(row[len(KEYS)]))
    data = {"keys": KEYS, "numbers": numbers, "rows": rows}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return _environment().get_template("images.html.j2").render(results=results, data=text)


def _json_value(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5) if isfinite(value) else None
    return value.item() if hasattr(value, "item") else value
