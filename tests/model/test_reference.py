"""model/reference.py: a cut-out, centred for the image encoder."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.reference import prepare_reference

GREY = torch.tensor(127 / 255)


def cutout(height: int, width: int, colour: tuple[int, int, int] = (255, 0, 0), margin: int = 0) -> np.ndarray:
    """An opaque rectangle with a transparent margin, whose hidden colour is white."""
    picture = np.zeros((height + 2 * margin, width + 2 * margin, 4), np.uint8)
    picture[..., :3] = 255
    picture[margin : margin + height, margin : margin + width] = (*colour, 255)
    return picture


def subject_of(reference: torch.Tensor) -> torch.Tensor:
    """(size, size) bool: not mid-grey."""
    return (reference - GREY).abs().amax(dim=0) > 0.01


def extent(covered: torch.Tensor) -> tuple[int, int, int, int]:
    """top, bottom, left, right; the last two of each exclusive."""
    rows, columns = covered.any(dim=1).nonzero(), covered.any(dim=0).nonzero()
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def test_the_result_is_a_square_of_floats_between_0_and_1():
    reference = prepare_reference(cutout(30, 10), 50)
    assert reference.shape == (3, 50, 50) and reference.dtype == torch.float32
    assert 0 <= reference.min() and reference.max() <= 1


def test_the_longer_side_fills_nine_tenths_and_the_aspect_stays():
    assert extent(subject_of(prepare_reference(cutout(30, 10), 100))) == (5, 95, 35, 65)
    assert extent(subject_of(prepare_reference(cutout(10, 30), 100))) == (35, 65, 5, 95)


def test_transparent_margins_do_not_count():
    with_margin, without = prepare_reference(cutout(20, 20, margin=15), 40), prepare_reference(cutout(20, 20), 40)
    assert torch.equal(with_margin, without)


def test_hidden_colours_do_not_bleed_into_the_edge():
    reference = prepare_reference(cutout(21, 13, (0, 0, 0), margin=1), 64)
    assert reference.max() <= GREY + 1e-6


def test_around_the_subject_is_mid_grey_or_the_background():
    background = np.zeros((8, 8, 3), np.uint8)
    background[..., 2] = 255
    assert torch.equal(prepare_reference(cutout(10, 10), 40)[:, 0, 0], GREY.expand(3))
    blue = prepare_reference(cutout(10, 10), 40, background)
    assert blue[:, 0, 0].tolist() == [0, 0, 1]
    assert blue[:, 20, 20].tolist() == [1, 0, 0]


def test_half_transparent_pixels_mix_with_what_is_behind():
    picture = cutout(10, 10, (255, 255, 255))
    picture[..., 3] = 204
    torch.testing.assert_close(prepare_reference(picture, 40)[:, 20, 20], (0.8 + 0.2 * GREY).expand(3))


def test_the_share_of_the_frame_can_be_chosen():
    assert extent(subject_of(prepare_reference(cutout(10, 10), 100, fill=0.5))) == (25, 75, 25, 75)


def test_the_cutout_is_not_changed():
    picture = cutout(10, 10, margin=2)
    before = picture.copy()
    prepare_reference(picture, 40)
    assert np.array_equal(picture, before)


def test_an_empty_cutout_is_refused():
    with pytest.raises(ValueError, match="empty"):
        prepare_reference(np.zeros((5, 5, 4), np.uint8), 40)
