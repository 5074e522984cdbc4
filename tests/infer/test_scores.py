"""infer/evaluate/scores.py against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from infer.evaluate.scores import box_iou, found_first, placement


def test_a_subject_is_found_when_its_own_picture_is_the_nearest() -> None:
    code = torch.tensor([1.0, 0.0])
    assert found_first(code, torch.tensor([[0.9, 0.1], [0.0, 1.0], [0.8, 0.6]]))
    assert not found_first(code, torch.tensor([[0.8, 0.6], [0.0, 1.0], [0.9, 0.1]]))


def test_a_tie_is_not_found() -> None:
    assert not found_first(torch.tensor([1.0, 0.0]), torch.tensor([[0.5, 0.0], [0.5, 0.3]]))


@pytest.mark.parametrize(
    ("second", "expected"),
    [((0.0, 0.0, 0.5, 0.5), 1.0), ((0.25, 0.0, 0.75, 0.5), 1 / 3), ((0.5, 0.5, 1.0, 1.0), 0.0)],
)
def test_overlap_of_boxes(second: tuple[float, float, float, float], expected: float) -> None:
    assert box_iou((0.0, 0.0, 0.5, 0.5), second) == pytest.approx(expected)


def test_each_seen_box_serves_one_asked_box() -> None:
    left, right = (0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5)
    assert placement([left, right], [right, left]) == 1.0
    assert placement([left, left], [left]) == 0.5
    assert placement([left], []) == 0.0
