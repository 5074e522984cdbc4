"""train/data/crops.py: subjects cut from pictures by their boxes."""

from __future__ import annotations

import torch

from train.data.crops import MARGIN, crop_to_boxes


def test_a_box_without_margin_that_is_the_picture_gives_the_picture_back() -> None:
    picture = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    half = 0.5 / MARGIN
    torch.testing.assert_close(
        crop_to_boxes(picture, torch.tensor([[0.5 - half, 0.5 - half, 0.5 + half, 0.5 + half]]), 8), picture
    )


def test_the_crop_is_square_around_the_longer_side_and_the_thing_fills_it() -> None:
    picture = torch.zeros(1, 3, 64, 64)
    picture[..., 8:40, 32:48] = 1.0  # rows 8..40, columns 32..48
    crop = crop_to_boxes(picture, torch.tensor([[0.5, 0.125, 0.75, 0.625]]), 44)[0, 0]
    inside = (crop > 0.5).nonzero()
    height, width = (inside.max(dim=0).values - inside.min(dim=0).values + 1).tolist()
    assert abs(height - 44 / MARGIN) <= 1 and abs(width - 22 / MARGIN) <= 1


def test_beyond_the_picture_its_edge_goes_on() -> None:
    picture = torch.full((1, 3, 8, 8), 0.7)
    torch.testing.assert_close(
        crop_to_boxes(picture, torch.tensor([[-0.5, -0.5, 0.5, 0.5]]), 8), torch.full((1, 3, 8, 8), 0.7)
    )
