"""GrabCut in boxes: how good it is on the toybox, and what it does where colours tell nothing."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.record import BoxPx
from data_pipeline.settings import settings_of
from data_pipeline.stages.segment.grabcut import GrabCutSegmenter, GrabCutSettings, whole_pixels
from data_pipeline.toybox.world import ToyboxWorld


@pytest.fixture(scope="module")
def segmenter() -> GrabCutSegmenter:
    return GrabCutSettings().load("cpu")


def disc(size: int, centre: tuple[int, int], radius: int) -> tuple[np.ndarray, np.ndarray, BoxPx]:
    """A red disc on noisy green, its mask and its box."""
    y, x = np.ogrid[:size, :size]
    mask = np.hypot(x - centre[0], y - centre[1]) <= radius
    picture = np.where(mask[..., None], (200, 30, 30), (30, 150, 40)) + np.random.default_rng(0).normal(
        0, 8, (size, size, 3)
    )
    box = centre[0] - radius, centre[1] - radius, centre[0] + radius + 1, centre[1] + radius + 1
    return picture.clip(0, 255).astype(np.uint8), mask, box


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    return float((found & truth).sum() / (found | truth).sum())


def test_true_boxes_of_the_toybox_give_nearly_the_true_masks(segmenter: GrabCutSegmenter) -> None:
    world = ToyboxWorld("val", size=256, min_subjects=1)
    overlaps = []
    for scene in (world.scene(index) for index in range(24)):
        (masks,) = segmenter.segment([scene.image], [[entity.box_xyxy_px for entity in scene.entities]])
        assert masks.dtype == bool and masks.shape == (len(scene.entities), 256, 256)
        overlaps += [overlap(mask, entity.mask) for mask, entity in zip(masks, scene.entities, strict=True)]
    assert np.mean(overlaps) > 0.9  # the inscribed ellipses alone: 0.66
    assert np.median(overlaps) > 0.95


@pytest.mark.parametrize("size", [64, 200, 1600])
def test_a_disc_is_cut_out_at_every_size(segmenter: GrabCutSegmenter, size: int) -> None:
    picture, mask, box = disc(size, (size // 3, size // 2), size // 5)
    (found,) = segmenter.segment([picture], [[box]])
    assert overlap(found[0], mask) > 0.97


def test_a_mask_does_not_depend_on_other_boxes_or_pictures(segmenter: GrabCutSegmenter) -> None:
    world = ToyboxWorld("val", size=128, min_subjects=2)
    scenes = [world.scene(index) for index in range(3)]
    boxes = [[entity.box_xyxy_px for entity in scene.entities] for scene in scenes]
    together = segmenter.segment([scene.image for scene in scenes], boxes)
    for scene, given, masks in zip(scenes, boxes, together, strict=True):
        for box, mask in zip(given, masks, strict=True):
            cv2.setRNGSeed(int(box[0]) + 7)  # whatever was drawn before
            assert np.array_equal(segmenter.segment([scene.image], [[box]])[0][0], mask)


def test_small_islands_are_dropped(segmenter: GrabCutSegmenter) -> None:
    picture, mask, _ = disc(160, (70, 80), 30)
    picture[30:41, 64:76] = picture[80, 70]  # the disc's colour, in the box but apart from the disc
    (found,) = segmenter.segment([picture], [[(35, 25, 106, 116)]])
    assert overlap(found[0], mask) > 0.97
    assert not found[0, 30:41].any()


def test_a_thing_that_fills_the_picture_is_told_from_the_corners(segmenter: GrabCutSegmenter) -> None:
    """Nothing lies outside of the box. Taken as a mere guess, the corners are lost to the thing: 0.66."""
    world = ToyboxWorld("val", size=256, min_subjects=1)
    overlaps = []
    for entity, image in ((entity, scene.image) for scene in map(world.scene, range(24)) for entity in scene.entities):
        x0, y0, x1, y1 = map(int, entity.box_xyxy_px)
        (masks,) = segmenter.segment([image[y0:y1, x0:x1]], [[(0, 0, x1 - x0, y1 - y0)]])
        overlaps.append(overlap(masks[0], entity.mask[y0:y1, x0:x1]))
    assert np.mean(overlaps) > 0.7


@pytest.mark.parametrize(
    "box",
    [
        (10, 10, 50, 40),
        (0, 0, 64, 48),  # the whole picture
        (5.2, 7.7, 5.9, 7.9),  # less than a pixel
        (0, 20, 64, 21),
        (63.9, 47.9, 64, 48),
        (20, 10, 22, 40),
        (1, 1, 63, 47),
    ],
)
@pytest.mark.parametrize("kind", ["flat", "noise"])
def test_a_mask_is_never_empty_and_stays_in_its_box(segmenter: GrabCutSegmenter, box: BoxPx, kind: str) -> None:
    picture = np.full((48, 64, 3), 90, np.uint8)
    if kind == "noise":
        picture = np.random.default_rng(1).integers(0, 256, picture.shape).astype(np.uint8)
    (masks,) = segmenter.segment([picture], [[box]])
    x0, y0, x1, y1 = whole_pixels(box, 64, 48)
    assert masks[0].any()
    assert masks[0].sum() == masks[0, y0:y1, x0:x1].sum()


def test_where_grabcut_finds_nothing_the_mask_is_the_ellipse_in_the_box(segmenter: GrabCutSegmenter) -> None:
    picture = np.zeros((90, 90, 3), np.uint8)
    picture[5:, :] = 255  # the box holds but one colour, and so does what is around it
    (masks,) = segmenter.segment([picture], [[(20, 30, 60, 60)]])
    y, x = np.ogrid[:90, :90]
    ellipse = np.hypot((x + 0.5 - 40) / 20, (y + 0.5 - 45) / 15) <= 1
    assert overlap(masks[0], ellipse) > 0.98


def test_a_picture_of_one_pixel_and_a_picture_without_boxes(segmenter: GrabCutSegmenter) -> None:
    one, none = segmenter.segment(
        [np.zeros((1, 1, 3), np.uint8), np.zeros((6, 8, 3), np.uint8)], [[(0.0, 0.0, 1.0, 1.0)], []]
    )
    assert one.tolist() == [[[True]]]
    assert none.shape == (0, 6, 8)


def test_the_record_says_which_opencv_it_was(segmenter: GrabCutSegmenter) -> None:
    assert segmenter.provenance.backend == "grabcut"
    assert segmenter.provenance.revision == cv2.__version__


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(UserError, match="iterations"):
        settings_of(GrabCutSettings, {"iterations": 0}, "data.yaml")
