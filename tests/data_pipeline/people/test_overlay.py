"""What is drawn over a picture: outlines as large as their masks, labels apart and inside, phrases where they stand."""

from __future__ import annotations

import re
from dataclasses import replace

import cv2
import numpy as np
import pytest

from data_pipeline.people.overlay import Piece, Rectangle, caption_pieces, outline, picture_svg, place_labels
from data_pipeline.record import Entity
from tests.data_pipeline.people.built_folder import entity, sample


def area_of(path: str) -> float:
    """Area of an SVG path of polygons, holes taken off (even-odd, nested once)."""
    areas = []
    for part in re.findall(r"M([^Z]+)Z", path):
        points = np.array([[float(value) for value in point.split()] for point in part.split("L")])
        x, y = points.T
        areas.append(abs(float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))) / 2)
    return max(areas) - sum(sorted(areas)[:-1]) if areas else 0.0


@pytest.mark.parametrize("side", [24, 100, 512, 1600])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_an_outline_encloses_the_area_of_its_mask_and_leaves_its_holes_out(side: int, scale: float) -> None:
    mask = np.zeros((side, side), np.uint8)
    cv2.circle(mask, (side // 2, side // 2), side // 3, 1, -1)
    cv2.circle(mask, (side // 2, side // 2), side // 6, 0, -1)
    assert area_of(outline(mask.astype(bool), scale)) == pytest.approx(mask.sum() * scale**2, rel=0.04)


def test_an_outline_keeps_a_single_pixel_of_a_small_picture() -> None:
    mask = np.zeros((20, 20), bool)
    mask[7, 3] = True
    points = [tuple(map(float, point.split())) for point in outline(mask, 1.0).strip("MZ").split("L")]
    assert min(points) >= (3, 7) and max(points) <= (4, 8) and area_of(outline(mask, 1.0)) == pytest.approx(1, rel=0.15)


def test_the_outline_of_a_ragged_mask_stays_short() -> None:
    ragged = np.random.default_rng(0).random((400, 400)) > 0.5
    assert outline(ragged, 1.0, most_points=300).count(" ") <= 300
    assert outline(np.zeros((10, 10), bool), 1.0) == ""


def overlaps(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def test_labels_never_leave_the_picture_nor_cover_each_other() -> None:
    draw = np.random.default_rng(0)
    for _ in range(150):
        width, height = draw.integers(30, 420), draw.integers(20, 470)
        corners = np.sort(draw.random((draw.integers(1, 13), 2, 2)), axis=1) * (width, height)
        boxes = [(a[0], a[1], b[0], b[1]) for a, b in corners]
        texts = [f"{i} {'a very long phrase '[: draw.integers(2, 19)]} 0.5" for i in range(len(boxes))]
        places = [label.place for label in place_labels(boxes, texts, width, height) if label]
        assert all(p[0] >= 0 and p[1] >= 0 and p[2] <= width + 1e-6 and p[3] <= height + 1e-6 for p in places)
        assert not any(overlaps(a, b) for i, a in enumerate(places) for b in places[:i])


def test_a_label_stands_above_its_box_inside_where_there_is_no_room_and_aside_for_others() -> None:
    (above,) = place_labels([(100, 100, 200, 200)], ["1 dog 0.5"], 400, 400)
    (inside,) = place_labels([(100, 5, 200, 200)], ["1 dog 0.5"], 400, 400)
    assert above and above.place[0] == 100 and above.place[3] == 100
    assert inside and inside.place[1] == 5
    small, large = place_labels([(100, 100, 150, 150), (100, 100, 200, 200)], ["1 dog 0.5", "2 cat 0.5"], 400, 400)
    assert small and large and small.place[3] == 100 and large.place[3] != 100


def test_where_all_is_full_a_label_is_its_number_or_nothing() -> None:
    box = (0.0, 0.0, 110.0, 36.0)
    labels = place_labels([box] * 12, [f"{i} thing 0.5" for i in range(12)], 110, 36)
    texts = [label.text for label in labels if label]
    assert any(text.isdigit() for text in texts) and None in labels


def pieces(caption: str, *spans: tuple[int, int] | None) -> list[Piece]:
    one = entity(0, caption, caption, (0, 0, 10, 10), 0.5, (20, 20), 10)
    entities: list[Entity] = [replace(one, id=i, caption_span=span) for i, span in enumerate(spans)]
    return caption_pieces(replace(sample("a", (20, 20), caption).record, entities=tuple(entities)))


def test_a_caption_is_cut_at_its_phrases_and_nothing_of_it_is_lost() -> None:
    assert pieces("a dog and a cat", (10, 15), (0, 5)) == [Piece("a dog", (2,)), Piece(" and "), Piece("a cat", (1,))]
    assert pieces("two dogs run", (0, 8), (0, 8), None) == [Piece("two dogs", (1, 2)), Piece(" run")]
    for spans in ([(0, 8), (4, 12)], [(0, 12), (4, 8)], [(3, 5), (5, 9)]):
        assert "".join(piece.text for piece in pieces("two dogs run", *spans)) == "two dogs run"  # type: ignore[arg-type]


def test_a_drawing_holds_every_entity_in_its_colour_and_escapes_what_it_says() -> None:
    caption = "a <b> & a ball"
    things = [
        entity(0, "a <b>", caption, (0, 0, 30, 30), 0.25, (60, 60), 30),
        entity(1, "a ball", caption, (30, 30, 60, 60), 1.0, (60, 60), 30),
    ]
    masks = [np.ones((60, 60), bool)] * 2
    svg = picture_svg(sample("a", (60, 60), caption, things).record, masks, "data:,")
    assert svg.count('class="mask e0"') == svg.count('class="mask e1"') == svg.count('class="box e1"') == 1
    assert "1 a &lt;b&gt; 0.25" in svg and "2 a ball 1.00" in svg and "<b>" not in svg
