"""The rules between the stages, on numbers made by hand."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from data_pipeline.rules import RuleSettings, count_reason, keep_boxes, locate, mask_fills
from data_pipeline.stages import BoxScores


def scores(boxes: list[list[float]], tokens: list[list[float]], chunks: list[list[float]]) -> BoxScores:
    return BoxScores(*(np.array(values, np.float32) for values in (boxes, tokens, chunks)))


def test_a_box_goes_to_its_best_chunk_and_needs_both_scores() -> None:
    found = keep_boxes(
        scores(
            [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 60, 10]],
            [[0.9, 0.3], [0.24, 0.1], [0.3, 0.9], [0.9, 0.9]],
            [[0.4, 0.3], [0.23, 0.1], [0.19, 0.1], [0.9, 0.9]],
        ),
        RuleSettings(),
    )
    # The second lacks a good token, the third a good chunk (its best is the first), the fourth has no area.
    assert [(box.chunk, box.box_xyxy_px, pytest.approx(box.score)) for box in found] == [(0, (0, 0, 10, 10), 0.4)]


def test_of_boxes_that_overlap_the_better_stays_whatever_it_is_called() -> None:
    boxes = [[0, 0, 10, 10], [0, 0, 10, 6], [0, 5, 10, 15], [0, 0, 10, 9.9]]
    given = scores(boxes, [[0.5, 0], [0.6, 0], [0.7, 0], [0, 0.9]], [[0.5, 0], [0.6, 0], [0.7, 0], [0, 0.9]])
    # IoU with the best (last): 0.99, 0.61, 0.32.
    assert [(box.chunk, box.box_xyxy_px[1]) for box in keep_boxes(given, RuleSettings())] == [(1, 0), (0, 5)]
    assert len(keep_boxes(given, RuleSettings(nms_iou=0.3))) == 1
    assert len(keep_boxes(given, RuleSettings(nms_iou=1.0))) == 4


def test_no_candidate_is_no_box() -> None:
    assert keep_boxes(scores([[0, 0, 1, 1]], [[0.1]], [[0.1]]), RuleSettings()) == []
    empty = BoxScores(np.zeros((0, 4), np.float32), np.zeros((0, 2), np.float32), np.zeros((0, 2), np.float32))
    assert keep_boxes(empty, RuleSettings()) == []


@pytest.mark.parametrize(("count", "reason"), [(2, "too_few_nouns"), (3, None), (8, None), (9, "too_many_nouns")])
def test_counts_outside_their_limits_have_a_reason(count: int, reason: str | None) -> None:
    assert count_reason(count, RuleSettings().nouns, "nouns") == reason


@pytest.mark.parametrize(
    ("words", "found"),
    [("dog", "Dogs"), ("red ball", "red ball"), ("do", None), ("bus", "buses"), ("ball (toy)", None)],
)
def test_words_are_found_whole_in_any_case_and_number(words: str, found: str | None) -> None:
    caption = "Dogs with a red ball by two buses"
    span = locate(words, caption)
    assert (caption[slice(*span)] if span else None) == found


def test_an_empty_mask_never_fills_its_box() -> None:
    mask = np.zeros((10, 10), bool)
    assert not mask_fills(mask, (0, 0, 10, 10), 0.0)
    mask[:5] = True
    assert mask_fills(mask, (0, 0, 10, 10), 0.5) and not mask_fills(mask, (0, 0, 10, 10), 0.51)


def test_limits_that_no_picture_can_keep_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"rules.nouns=\[4, 2\]: expected 0 <= fewest <= most"):
        RuleSettings(nouns=(4, 2))
