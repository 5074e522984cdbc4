"""Places of subjects that nobody gave a box."""

from __future__ import annotations

from itertools import combinations

import pytest
from PIL import Image

from data_pipeline.errors import UserError
from infer.layout import place_subjects, seeded_layout
from infer.subjects import Box, Subject


def overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@pytest.mark.parametrize("count", range(1, 9))
def test_boxes_lie_inside_the_picture_and_do_not_overlap(count: int) -> None:
    for seed in range(30):
        boxes = seeded_layout([None] * count, seed)
        assert all(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 for x0, y0, x1, y1 in boxes)
        assert not any(overlap(a, b) for a, b in combinations(boxes, 2))


def test_the_same_seed_gives_the_same_boxes_and_another_seed_others() -> None:
    assert seeded_layout([None, None], 7) == seeded_layout([None, None], 7)
    assert seeded_layout([None, None], 7) != seeded_layout([None, None], 8)


def test_boxes_are_large_enough_to_show_the_subjects() -> None:
    for count, smallest_side in {1: 0.5, 2: 0.3, 4: 0.2, 8: 0.1}.items():
        boxes = [box for seed in range(20) for box in seeded_layout([None] * count, seed)]
        assert min(x1 - x0 for x0, _, x1, _ in boxes) > smallest_side


def test_given_boxes_stay_and_the_others_keep_clear_of_them() -> None:
    given = (0.0, 0.0, 0.6, 0.6)
    for seed in range(20):
        boxes = seeded_layout([None, given, None], seed)
        assert boxes[1] == given
        assert not any(overlap(a, b) for a, b in combinations(boxes, 2))


def test_a_box_takes_the_shape_of_the_subject_in_a_wide_picture() -> None:
    upright = Image.new("RGBA", (100, 100))
    upright.paste((255, 0, 0, 255), (40, 10, 60, 50))  # 20 wide, 40 high
    box = place_subjects([Subject("vase", [upright])], seed=1, height_by_width=0.5)[0]
    assert (box[2] - box[0]) / (box[3] - box[1]) == pytest.approx(0.25 / 1, rel=0.35)  # clipped to a third


def test_no_room_beside_the_given_boxes_is_refused() -> None:
    with pytest.raises(UserError, match="leave no room"):
        seeded_layout([(0, 0, 1, 1), None], 0)


def test_more_than_eight_subjects_are_refused() -> None:
    with pytest.raises(UserError, match="at most 8"):
        seeded_layout([None] * 9, 0)


def test_a_transparent_reference_is_refused() -> None:
    with pytest.raises(UserError, match="subject dog: empty cut-out"):
        place_subjects([Subject("dog", [Image.new("RGBA", (8, 8))])], seed=0)
