"""model/subject_adapter/location.py: boxes as rasters, the location mask and its convolution."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from model.subject_adapter.location import LocationConvolution, grid_of_tokens, location_mask, rasterise_boxes


def mask_of(*boxes: tuple[float, ...], keep: bool = True, size: tuple[int, int] = (4, 4)) -> torch.Tensor:
    return location_mask(torch.tensor([boxes]), torch.full((1, len(boxes)), keep), size)[0, 0]


def test_the_mask_is_0_inside_a_box_and_1_outside():
    expected = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    assert torch.equal(mask_of((0.0, 0.0, 0.5, 0.5)), expected.float())


def test_boxes_are_xyxy_so_that_a_wide_box_covers_columns():
    assert torch.equal(mask_of((0.0, 0.0, 1.0, 0.25)).sum(dim=1), torch.tensor([0.0, 4.0, 4.0, 4.0]))


def test_the_masks_of_several_subjects_are_multiplied():
    both = mask_of((0.0, 0.0, 0.5, 0.5), (0.25, 0.25, 1.0, 1.0))
    assert torch.equal(both, mask_of((0.0, 0.0, 0.5, 0.5)) * mask_of((0.25, 0.25, 1.0, 1.0)))


def test_the_null_location_is_0_everywhere():
    assert mask_of((0.0, 0.0, 0.5, 0.5), keep=False).eq(0).all()


def test_a_subject_that_is_not_there_leaves_the_others_mask_alone():
    boxes = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.0, 0.0]]])
    mask = location_mask(boxes, torch.tensor([[True, False]]), (4, 4))
    assert torch.equal(mask[0, 0], mask_of((0.0, 0.0, 0.5, 0.5)))


def test_without_subject_slots_the_mask_is_0():
    assert location_mask(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool), (4, 4)).eq(0).all()


@pytest.mark.parametrize("box", [(0.51, 0.51, 0.52, 0.52), (0.0, 0.0, 0.01, 0.01), (0.999, 0.999, 1.0, 1.0)])
def test_the_smallest_box_covers_exactly_one_cell(box):
    assert mask_of(box).sum() == 15


def test_a_mask_need_not_be_square():
    assert torch.equal(mask_of((0.0, 0.0, 0.5, 1.0), size=(2, 4)), torch.tensor([[0.0, 0, 1, 1], [0.0, 0, 1, 1]]))


def test_neighbouring_boxes_share_no_cell():
    boxes = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]])
    assert rasterise_boxes(boxes, (8, 8)).sum(dim=0).eq(1).all()


def test_the_grid_of_a_level_is_the_latent_size_halved_and_rounded_up():
    assert [grid_of_tokens(n, (9, 12)) for n in (108, 30, 9)] == [(9, 12), (5, 6), (3, 3)]


def test_a_token_count_that_no_level_has_is_refused():
    with pytest.raises(ValueError, match="7 image tokens"):
        grid_of_tokens(7, (8, 8))


def test_the_convolution_starts_at_zero_and_has_no_bias():
    convolution = LocationConvolution(16)
    assert convolution.bias is None
    assert convolution.weight.eq(0).all()


def test_the_convolution_equals_a_fifth_input_channel():
    torch.manual_seed(0)
    stock, five = torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.Conv2d(5, 16, 3, padding=1)
    location = LocationConvolution(16)
    with torch.no_grad():
        five.bias.copy_(stock.bias)
        five.weight[:, :4].copy_(stock.weight)
        location.weight.copy_(five.weight[:, 4:])
        latents, mask = torch.randn(2, 4, 8, 8), F.one_hot(torch.arange(8), 8).float().expand(2, 1, 8, 8)
        torch.testing.assert_close(
            stock(latents) + location(mask), five(torch.cat([latents, mask], dim=1)), atol=8e-7, rtol=0
        )
