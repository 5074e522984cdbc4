"""Which entities are trained on: each filter at hand-made boxes and masks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.record import BoxPx, Entity, MaskRle
from train.data.entity_filters import (
    Candidate,
    area_share,
    aspect,
    eligible,
    mask_share,
    placed_well,
    read_nouns,
    reason_of_place,
    reason_of_record,
    white_share,
    without_overlaps,
)
from train.settings import EntityFilters

FILTERS = EntityFilters()
SIZE = 100


def entity(noun: str = "dog", score: float = 0.9, references: tuple[str, ...] = ("k.ref0.png",)) -> Entity:
    return Entity(0, noun, f"small {noun}", None, (0, 0, 1, 1), score, MaskRle((1, 1), ""), 1, None, references)


def candidate(box: BoxPx, *, score: float = 0.9, seen: float = 1.0, covered: float = 1.0) -> Candidate:
    """An entity in a square of 100 pixels, whose mask covers the upper part of its box."""
    mask = np.zeros((SIZE, SIZE), bool)
    x0, y0, x1, y1 = (int(value) for value in box)
    mask[y0 : y0 + round((y1 - y0) * covered), x0:x1] = True
    return Candidate(entity(score=score), box, mask, seen)


def picture(white_rows: int = 0) -> np.ndarray:
    pixels = np.full((SIZE, SIZE, 3), 100, np.uint8)
    pixels[:white_rows] = 255
    return pixels


def kept_and_dropped(*candidates: Candidate, most: int = 4, **changes: Any) -> tuple[list[BoxPx], dict[str, int]]:
    drops: Counter[str] = Counter()
    filters = FILTERS.model_copy(update=changes)
    kept = placed_well(picture(), list(candidates), filters, most, drops)
    return [c.box_xyxy_px for c in kept], {reason: count for reason, count in drops.items() if count}


def test_the_published_values_are_the_defaults() -> None:
    assert FILTERS.model_dump() == {
        "min_area": 0.08, "max_area": 0.7, "min_aspect": 0.3, "max_aspect": 3.0, "min_score": 0.3,
        "min_mask_share": 0.6, "max_overlap": 0.8, "max_white": 0.1,
    }  # fmt: skip


def test_shares_of_boxes_and_masks_are_what_one_counts_by_hand() -> None:
    assert area_share((10, 20, 50, 70), SIZE) == 0.2  # 40 x 50 of 10,000
    assert aspect((10, 20, 50, 70)) == 0.8
    assert mask_share(candidate((10, 20, 50, 70), covered=0.5).mask, (10, 20, 50, 70)) == 0.5
    assert mask_share(candidate((10, 20, 50, 70)).mask, (10, 20, 90, 70)) == 0.5  # the right half of the box is empty


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((0, 0, 20, 39), "area"),  # 0.078
        ((0, 0, 20, 40), None),  # 0.08
        ((0, 0, 70, 100), None),  # 0.7
        ((0, 0, 71, 100), "area"),
        ((0, 0, 30, 100), None),  # 0.3 to 1
        ((0, 0, 29, 100), "aspect"),
        ((0, 0, 90, 30), None),  # 3 to 1
        ((0, 0, 90, 29), "aspect"),
    ],
)
def test_boxes_too_small_too_large_too_narrow_or_too_flat_are_left_out(box: BoxPx, reason: str | None) -> None:
    assert reason_of_place(candidate(box), FILTERS) == reason


def test_masks_must_cover_most_of_their_box_and_boxes_must_mostly_be_seen() -> None:
    box = (10.0, 10.0, 60.0, 60.0)
    assert reason_of_place(candidate(box, covered=0.6), FILTERS) is None
    assert reason_of_place(candidate(box, covered=0.58), FILTERS) == "mask"
    assert reason_of_place(candidate(box, seen=0.6), FILTERS) is None
    assert reason_of_place(candidate(box, seen=0.59), FILTERS) == "cut_off"
    assert reason_of_place(candidate(box, covered=0), FILTERS) == "cut_off"


def test_what_the_record_tells_is_judged_by_score_noun_and_references() -> None:
    assert reason_of_record(entity(score=0.3), FILTERS, None, False) is None
    assert reason_of_record(entity(score=0.29), FILTERS, None, False) == "score"
    assert reason_of_record(entity(references=()), FILTERS, None, True) == "no_reference"
    assert reason_of_record(entity(references=()), FILTERS, None, False) is None
    assert reason_of_record(entity("Dog"), FILTERS, frozenset({"dog"}), False) is None
    assert reason_of_record(entity("dog"), FILTERS, frozenset({"small dog"}), False) is None
    assert reason_of_record(entity("dog"), FILTERS, frozenset({"cat"}), False) == "noun"


def test_drops_are_counted_by_reason() -> None:
    drops: Counter[str] = Counter()
    given = [entity("dog"), entity("cat"), entity("dog", score=0.1), entity("cow")]
    assert eligible(given, FILTERS, frozenset({"dog"}), True, drops) == [given[0]]
    assert drops == {"noun": 2, "score": 1}


def test_of_two_boxes_that_overlap_too_much_the_lower_score_goes() -> None:
    # 40 x 41 and 40 x 40 of 1600: over 0.8 of the smaller; a box inside another counts as wholly covered.
    outer, apart = (0.0, 0.0, 50.0, 50.0), (50.0, 50.0, 100.0, 100.0)
    inner, at_the_edge = (10.0, 10.0, 40.0, 40.0), (10.0, 0.0, 60.0, 50.0)
    assert without_overlaps([outer, inner, apart], [0.5, 0.9, 0.4], 0.8) == [1, 2]
    assert without_overlaps([outer, inner, apart], [0.9, 0.5, 0.4], 0.8) == [0, 2]
    assert without_overlaps([outer, at_the_edge], [0.9, 0.5], 0.8) == [0, 1], "0.8 itself is allowed"
    assert without_overlaps([outer, at_the_edge], [0.9, 0.5], 0.79) == [0]
    assert without_overlaps([], [], 0.8) == []


def test_a_picture_with_too_much_white_keeps_no_entities() -> None:
    assert white_share(picture(25)) == 0.25
    assert white_share(np.full((2, 2, 3), 229, np.uint8)) == 0  # 0.9 of 255 is 229.5
    drops: Counter[str] = Counter()
    given = [candidate((0, 0, 50, 50))]
    assert placed_well(picture(10), given, FILTERS, 4, drops) == given
    assert placed_well(picture(11), given, FILTERS, 4, drops) == []
    assert drops["white"] == 1


def test_the_largest_stay_and_each_drop_has_one_reason() -> None:
    small, large, middle = (0.0, 0.0, 30.0, 30.0), (40.0, 40.0, 100.0, 100.0), (0.0, 50.0, 39.0, 100.0)
    flat, twin = (40.0, 0.0, 100.0, 15.0), (41.0, 40.0, 100.0, 100.0)
    given = [candidate(small), candidate(large), candidate(middle), candidate(flat), candidate(twin, score=0.5)]
    assert kept_and_dropped(*given, most=2) == ([large, middle], {"aspect": 1, "overlap": 1, "too_many": 1})
    assert kept_and_dropped(*given, max_aspect=9.0, max_overlap=1.0, min_area=0.0)[0][:2] == [large, twin]


def test_nouns_come_from_a_file_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "nouns.txt").write_text("# classes\nDog\n\n  Sports car \n")
    assert read_nouns(tmp_path / "nouns.txt") == {"dog", "sports car"}
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="names no noun"):
        read_nouns(tmp_path / "empty.txt")
    with pytest.raises(UserError, match="cannot be read"):
        read_nouns(tmp_path / "missing.txt")
