"""The sheet with references beside the pictures."""

from __future__ import annotations

import pytest
from PIL import Image

from infer.grid import make_grid


@pytest.mark.parametrize("pictures", [1, 4, 5])
@pytest.mark.parametrize("references", [0, 1, 7])
def test_every_reference_and_picture_stands_on_the_sheet(pictures: int, references: int) -> None:
    sheet = make_grid(
        [Image.new("RGB", (8, 8), (200, 0, 0))] * pictures,
        [Image.new("RGBA", (8, 8), (0, 0, 200, 255))] * references,
        cell=10,
    )
    colours = {colour: count for count, colour in sheet.getcolors() or []}
    assert colours.get((200, 0, 0), 0) == 100 * pictures
    assert colours.get((0, 0, 200), 0) == 100 * references


def test_a_wide_picture_keeps_its_shape() -> None:
    sheet = make_grid([Image.new("RGB", (40, 20), (200, 0, 0))], [], cell=20)
    assert sum(count for count, colour in sheet.getcolors() or [] if colour == (200, 0, 0)) == 20 * 10
