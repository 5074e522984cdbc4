"""Pictures for the report: sheets of subject x method on the same seeds, best and worst cases. Nothing is hand-picked.

A sheet shows the first subjects of the protocol in its order; the row of subject number n shows its case number n, so
that prompts vary. Pictures are embedded as small WebP files; a budget keeps the page under 8 MB.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from math import ceil
from pathlib import Path
from typing import Any

from PIL import Image

from infer.evaluate.metrics import Column
from infer.evaluate.report import wording
from infer.evaluate.report.tables import PartTable, Row, of_role
from infer.evaluate.results import Results

SIDE, MANY_METHODS, SMALL_SIDE = 128, 12, 96  # pixels of the longer side; the smaller one where a row has many pictures
BUDGET = 5_500_000  # characters of all embedded pictures
ROWS, AT_ONCE, AT_LEAST = 40, 10, 8  # of a sheet: in all, before "show more", however large the pictures are
EXTREMES, FEW, FEWER = 6, 4, 3  # best and worst cases of a contender; of more contenders than FEW only FEWER


@dataclass(frozen=True)
class Tile:
    """A picture and the number below it."""

    source: str  # data URI; "" where there is no picture
    text: str  # below the picture, or in its place
    tip: str = ""


@dataclass(frozen=True)
class Strip:
    """A row of a sheet: what was asked, what was given, what each method drew."""

    subject: str
    prompt: str
    seed: int
    references: tuple[Tile, ...]
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Sheet:
    """A part's strips; those after `AT_ONCE` are folded away."""

    table: PartTable
    first: tuple[Strip, ...]
    more: tuple[Strip, ...]
    score: Column | None  # what the numbers below the pictures are

    @property
    def rule(self) -> str:
        """How these pictures were chosen, in words."""
        shown = len(self.first) + len(self.more)
        return (
            f"The first {shown} of {wording.count(self.table.groups, self.table.thing)} in the order of the protocol, "
            f"uncurated: {self.table.thing} number n is shown with its case number n, so that prompts vary; the same "
            "seed for every method."
        )


@dataclass(frozen=True)
class Extremes:
    """Best and worst cases of a contender."""

    row: Row
    best: tuple[Strip, ...]
    worst: tuple[Strip, ...]


class Album:
    """Embeds pictures of a run, each shrunk and encoded once, and counts what they take."""

    def __init__(self, folder: Path, side: int) -> None:
        self.folder, self.side, self.used = folder, side, 0
        self._known: dict[str, str] = {}

    def source(self, path: str) -> str:
        """A data URI; "" if the file cannot be read."""
        if path not in self._known:
            try:
                with Image.open(self.folder / path) as opened:
                    picture = opened.convert("RGBA" if "A" in opened.getbands() else "RGB")
            except OSError:
                return ""
            picture.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
            encoded = BytesIO()
            picture.save(encoded, "WEBP", quality=82)
            self._known[path] = f"data:image/webp;base64,{b64encode(encoded.getvalue()).decode()}"
        self.used += len(self._known[path])
        return self._known[path]


def open_album(results: Results, tables: Sequence[PartTable]) -> Album:
    """An album whose pictures are the smaller, the more stand in a row."""
    methods = max((len(table.rows) for table in tables), default=1)
    return Album(results.folder, SIDE if methods <= MANY_METHODS else SMALL_SIDE)


def sheets(results: Results, tables: Sequence[PartTable], album: Album) -> list[Sheet]:
    """A sheet a part. Parts share what the budget still has."""
    found = []
    for number, table in enumerate(tables):
        share = album.used + max(0, BUDGET - album.used) / (len(tables) - number)
        strips = list[Strip]()
        for place, group in enumerate(_groups(table)[:ROWS]):
            if place >= AT_LEAST and album.used >= share:
                break
            strips.append(_strip(results, table, group, place, album))
        found.append(Sheet(table, tuple(strips[:AT_ONCE]), tuple(strips[AT_ONCE:]), _score(table)))
    return found


def extremes(results: Results, table: PartTable, album: Album) -> list[Extremes]:
    """The cases with the highest and lowest score of each contender, one a subject, none in both lists."""
    column = _score(table)
    if column is None:
        return []
    found = []
    for row in table.contenders:
        known = row.table[row.table[column.name].notna()].sort_values(
            [column.name, "case"], ascending=[column.better == "lower", True]
        )
        best_of_each = known.drop_duplicates("group")
        worst_of_each = known.iloc[::-1].drop_duplicates("group")
        most = EXTREMES if len(table.contenders) <= FEW else FEWER
        count = min(most, ceil(len(best_of_each) / 2))
        best = list(best_of_each.head(count).itertuples())
        taken = {case.case for case in best}
        worst = [case for case in worst_of_each.itertuples() if case.case not in taken][:count]
        strips = [tuple(_lone(results, row, case, column, album) for case in cases) for cases in (best, worst)]
        found.append(Extremes(row, *strips))
    return [one for one in found if one.best]


def _score(table: PartTable) -> Column | None:
    """What stands below pictures: the subject score, else the first column there is."""
    return of_role(table.columns, "subject") or next(iter(table.columns), None)


def _groups(table: PartTable) -> list[str]:
    """In the protocol's order: as in the row that has most of them, then what only others have."""
    fullest = sorted(table.rows, key=lambda row: -row.pictures)
    return list(dict.fromkeys(group for row in fullest for group in row.table["group"]))


def _strip(results: Results, table: PartTable, group: str, place: int, album: Album) -> Strip:
    found = [(row, row.table[row.table["group"] == group]) for row in table.rows]
    cases = list(dict.fromkeys(case for _, rows in found for case in rows["case"]))
    case = cases[place % len(cases)]
    column = _score(table)
    tiles = []
    asked: Any = None
    for row, rows in found:
        one = next(rows[rows["case"] == case].itertuples(), None)
        asked = asked or one
        tiles.append(_tile(row, one, column, album))
    return Strip(asked.words, asked.prompt, int(asked.seed), _references(results, group, album), tuple(tiles))


def _lone(results: Results, row: Row, case: Any, column: Column, album: Album) -> Strip:
    return Strip(
        case.words,
        case.prompt,
        int(case.seed),
        _references(results, case.group, album),
        (_tile(row, case, column, album),),
    )


def _tile(row: Row, case: Any, column: Column | None, album: Album) -> Tile:
    if case is None:
        return Tile("", "hole" if row.holes else wording.NONE, f"{row.name}: no picture")
    text = wording.score(getattr(case, column.name)) if column else ""
    source = album.source(case.picture)
    if not source:
        return Tile("", "unreadable", case.picture)
    return Tile(source, text, f"{row.name}: {case.prompt} (seed {case.seed})")


def _references(results: Results, group: str, album: Album) -> tuple[Tile, ...]:
    sources = [album.source(path) for path in results.references.get(group, ())]
    return tuple(Tile(source, "", "reference") for source in sources if source)
