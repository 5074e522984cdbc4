"""One sheet of a run: the references in the left column, the pictures beside them. Written as `grid.png`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

CELL = 192  # pixels, side of one cell
GAP = 8  # pixels between cells
PAPER = (255, 255, 255)
REFERENCE_PAPER = (236, 236, 236)


def make_grid(pictures: Sequence[Image.Image], references: Sequence[Image.Image], cell: int = CELL) -> Image.Image:
    """Lay out pictures in a nearly square block, references in columns to its left.

    Args:
        pictures: at least one, any size; enlarged or reduced to the cell, keeping their aspect.
        references: RGBA cut-outs, none or more; shown on light grey.
        cell: side of a cell in pixels.
    Returns:
        RGB image.
    """
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = math.ceil(len(pictures) / columns)
    reference_columns = math.ceil(len(references) / rows)
    pitch = cell + GAP
    gutter = GAP if references else 0  # sets the references apart
    sheet = Image.new("RGB", ((reference_columns + columns) * pitch + GAP + gutter, rows * pitch + GAP), PAPER)
    for index, reference in enumerate(references):
        corner = (GAP + index // rows * pitch, GAP + index % rows * pitch)
        _paste(sheet, reference, corner, cell, REFERENCE_PAPER)
    for index, picture in enumerate(pictures):
        corner = (GAP + gutter + (reference_columns + index % columns) * pitch, GAP + index // columns * pitch)
        _paste(sheet, picture, corner, cell, PAPER)
    return sheet


def _paste(
    sheet: Image.Image, picture: Image.Image, corner: tuple[int, int], cell: int, paper: tuple[int, ...]
) -> None:
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    fitted = picture.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    tile = Image.new("RGBA", (cell, cell), paper)
    tile.alpha_composite(fitted, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    sheet.paste(tile.convert("RGB"), corner)
