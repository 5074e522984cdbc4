"""Proposals from pixels: things that stand out get boxes, the best one first; and their crops."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from data_pipeline.boxes import pairwise_iou
from data_pipeline.stages.detect.region_proposals import cut_regions, propose_boxes


def landscape(height: int = 200, width: int = 300) -> np.ndarray:
    """Sky over ground, both with soft noise."""
    generator = np.random.default_rng(0)
    picture = np.zeros((height, width, 3), np.float32)
    picture[: height // 2], picture[height // 2 :] = (120, 170, 230), (90, 150, 70)
    noise = cv2.resize(generator.normal(0, 6, (12, 18, 3)).astype(np.float32), (width, height))
    return (picture + noise).clip(0, 255).astype(np.uint8)


def test_a_thing_in_front_of_sky_and_ground_is_the_first_box() -> None:
    picture = landscape()
    cv2.circle(picture, (180, 100), 45, (200, 40, 30), -1)
    boxes, stability = propose_boxes(picture, 10)
    assert pairwise_iou(boxes[:1], np.array([[135, 55, 226, 146]]))[0, 0] > 0.85
    assert stability[0] == stability.max() > 0.4
    assert boxes.dtype == stability.dtype == np.float32


def test_each_of_two_things_side_by_side_has_a_box() -> None:
    picture = landscape()
    cv2.circle(picture, (90, 100), 40, (200, 40, 30), -1)
    cv2.circle(picture, (176, 100), 40, (240, 230, 40), -1)
    boxes, _ = propose_boxes(picture, 16)
    overlaps = pairwise_iou(np.array([[50, 60, 131, 141], [136, 60, 217, 141]]), boxes)
    assert (overlaps.max(axis=1) > 0.6).all()


def test_a_thing_that_touches_the_rim_is_still_found() -> None:
    picture = landscape()
    cv2.circle(picture, (30, 150), 45, (200, 40, 30), -1)
    boxes, _ = propose_boxes(picture, 10)
    assert pairwise_iou(boxes, np.array([[0, 105, 76, 196]])).max() > 0.7


def test_a_plain_picture_has_no_boxes() -> None:
    boxes, stability = propose_boxes(np.full((64, 64, 3), 128, np.uint8), 10)
    assert boxes.shape == (0, 4) and stability.shape == (0,)


@pytest.mark.parametrize("size", [(1, 1), (3, 400), (400, 3), (2, 2), (37, 53)])
def test_any_size_of_picture_is_taken_and_boxes_stay_inside(size: tuple[int, int]) -> None:
    picture = np.random.default_rng(1).integers(0, 256, (*size, 3)).astype(np.uint8)
    boxes, _ = propose_boxes(picture, 10)
    assert (boxes >= 0).all() and (boxes[:, 2] <= size[1]).all() and (boxes[:, 3] <= size[0]).all()


def test_equal_pictures_have_equal_boxes_whatever_came_before() -> None:
    picture = landscape()
    cv2.circle(picture, (180, 100), 45, (200, 40, 30), -1)
    first, _ = propose_boxes(picture, 10)
    propose_boxes(landscape(90, 70), 10)
    assert np.array_equal(first, propose_boxes(picture, 10)[0])
    assert len(propose_boxes(picture, 1)[0]) == 1


def test_iou_of_boxes() -> None:
    boxes = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]], float)
    assert pairwise_iou(boxes, boxes) == pytest.approx(np.array([[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]]))


def test_a_crop_is_square_around_the_box_and_the_edge_goes_on_outside() -> None:
    picture = np.zeros((100, 100, 3), np.uint8)
    picture[:, 50:] = 200
    crop = cut_regions(picture, np.array([[40, 20, 60, 30]], np.float32), 20, margin=0.0)[0]
    assert crop.shape == (20, 20, 3)
    assert crop[:, :9].max() == 0 and crop[:, 11:].min() == 200  # the box is 20 wide: one pixel a pixel
    edge = cut_regions(picture, np.array([[90, 40, 110, 60]], np.float32), 20, margin=0.0)[0]
    assert (edge == 200).all()


def test_a_large_region_is_averaged_down_and_keeps_its_place() -> None:
    picture = np.zeros((400, 400, 3), np.uint8)
    picture[::2, :200] = 100  # thin lines: 50 on average
    picture[:, 300:] = 200
    crop = cut_regions(picture, np.array([[0, 0, 400, 400]], np.float32), 40, margin=0.0)[0]
    assert crop[5:-5, 5:15].mean() == pytest.approx(50, abs=2)
    assert crop[:, 20:29].max() == 0 and crop[:, 31:].min() == 200
