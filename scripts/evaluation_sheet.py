"""Lay out what an evaluation drew as one picture, nothing picked: a row a subject or pair, a column a method.

    python scripts/evaluation_sheet.py outputs/evaluate/refine-toybox docs/images/refine.png

Row number n shows its subject's case number n, as the report does, so that prompts vary; all methods had the same seed.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import pandas
from PIL import Image, ImageDraw, ImageFont

TILE, GAP, HEAD, TEXT = 88, 4, 52, 16  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of an evaluation that is done")
    parser.add_argument("sheet", type=Path, help="PNG to write")
    parser.add_argument("--rows", type=int, default=8, help="subjects at most, then as many pairs")
    arguments = parser.parse_args()
    table = pandas.read_parquet(arguments.folder / "scores.parquet")
    methods = list(dict.fromkeys(table["method"]))
    cases = [case for part in ("single", "pair") for case in _cases(table[table["part"] == part], arguments.rows)]
    width, height = (len(methods) + 1) * (TILE + GAP) + GAP, len(cases) * (TILE + TEXT + GAP) + HEAD
    sheet = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column, name in enumerate(["given", *methods]):
        left = GAP + column * (TILE + GAP)
        pen.text((left, GAP), "\n".join(textwrap.wrap(name, 15)[:3]), fill="black", font=font)
    for number, case in enumerate(cases):
        rows, top = table[table["case"] == case], HEAD + number * (TILE + TEXT + GAP)
        drawn = {row.method: arguments.folder / row.picture for row in rows.itertuples()}
        given = arguments.folder / "references" / rows["group"].iloc[0] / "0.png"
        for column, path in enumerate([given, *(drawn.get(name) for name in methods)]):
            if path is not None:
                picture = Image.open(path).convert("RGBA").resize((TILE, TILE), Image.Resampling.BICUBIC)
                sheet.paste(picture, (GAP + column * (TILE + GAP), top), picture)
        pen.text((GAP, top + TILE + 1), rows["prompt"].iloc[0], fill="#333333", font=font)
    arguments.sheet.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.sheet, optimize=True)
    print(f"{arguments.sheet}: {len(cases)} cases of {len(methods)} methods")


def _cases(part: pandas.DataFrame, most: int) -> list[str]:
    """One case of each group: of the n-th its n-th."""
    groups = list(dict.fromkeys(part["group"]))[:most]
    found = [list(dict.fromkeys(part[part["group"] == group]["case"])) for group in groups]
    return [cases[number % len(cases)] for number, cases in enumerate(found)]


if __name__ == "__main__":
    main()
