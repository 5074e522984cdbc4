"""model/subject_adapter/places.py: patches are looked up by where they would land in the picture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.inputs import Drop, drop_conditions
from model.reference import FILL
from model.subject_adapter import SubjectCondition
from model.subject_adapter.fuser import SubjectFuser
from model.subject_adapter.grounding import fourier_box_features
from model.subject_adapter.places import cell_boxes, patch_boxes
from tests.model.tiny import LATENTS, tiny_adapter, tiny_subject_model, tiny_unet
from tests.model.tiny_inputs import tiny_inputs


def test_the_frame_around_the_box_is_cut_into_patches_row_by_row():
    half = 0.25 / FILL
    first, second, third, fourth = patch_boxes(torch.tensor([0.25, 0.25, 0.75, 0.75]), 4, (8, 8))
    torch.testing.assert_close(first, torch.tensor([0.5 - half, 0.5 - half, 0.5, 0.5]))
    torch.testing.assert_close(second, torch.tensor([0.5, 0.5 - half, 0.5 + half, 0.5]))
    torch.testing.assert_close(third, torch.tensor([0.5 - half, 0.5, 0.5, 0.5 + half]))
    torch.testing.assert_close(fourth, torch.tensor([0.5, 0.5, 0.5 + half, 0.5 + half]))


@pytest.mark.parametrize("latent_size", [(8, 8), (8, 16)])
def test_the_frame_is_square_in_the_picture_whatever_the_shapes_of_box_and_picture(latent_size):
    boxes = patch_boxes(torch.tensor([[0.1, 0.4, 0.9, 0.6], [0.4, 0.1, 0.6, 0.9]]), 16, latent_size)  # (2, 16, 4)
    sides = (boxes[..., 2:] - boxes[..., :2]) * torch.tensor([latent_size[1], latent_size[0]])
    torch.testing.assert_close(sides[..., 0], sides[..., 1])
    torch.testing.assert_close(boxes[:, 0, :2] + boxes[:, -1, 2:], torch.ones(2, 2))  # centred on the box


def test_cells_cover_the_picture_row_by_row():
    expected = [[0, 0, 0.5, 1 / 3], [0.5, 0, 1, 1 / 3], [0, 1 / 3, 0.5, 2 / 3]]
    torch.testing.assert_close(cell_boxes((3, 2), torch.device("cpu"))[:3], torch.tensor(expected))


def test_patches_that_form_no_square_are_refused():
    with pytest.raises(ValueError, match="6 patches form no square"):
        patch_boxes(torch.rand(4), 6, (8, 8))


def test_an_untrained_fuser_looks_most_at_the_patches_that_land_near_the_cell():
    torch.manual_seed(0)
    fuser = SubjectFuser("block", 128, 24, 4, 32, places=True)
    places = fourier_box_features(patch_boxes(torch.tensor([0.0, 0.0, 1.0, 1.0]), 16, (4, 4)))  # (16, 64)
    with torch.no_grad():
        keys, _ = fuser.keys_values(torch.zeros(1, 16, 24), places[None])
        cells = fuser.queries(torch.zeros(1, 16, 128), (4, 4))
    assert (cells[0] @ keys[0].T).argmax(dim=1).tolist() == list(range(16))


def test_an_unknown_place_leaves_the_keys_as_they_are():
    inputs = tiny_inputs()
    adapter = tiny_adapter(tiny_unet(), patch_places=True)
    hidden = replace(inputs, location_keep=torch.zeros(len(inputs), dtype=torch.bool))
    assert not adapter.condition(hidden, LATENTS[1:]).token_places.any()
    assert adapter.condition(inputs, LATENTS[1:]).token_places.any()


@pytest.mark.parametrize("kind", list(Drop))
def test_the_inference_form_equals_the_training_form_for_every_branch(kind):
    model = tiny_subject_model(patch_places=True)
    inputs = drop_conditions(tiny_inputs(), torch.tensor([int(kind), 0]))
    noisy = torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        trained = model(noisy, torch.tensor(7), inputs)
        drawn = model.denoise(noisy, torch.tensor(7), *model.encode(inputs, LATENTS[1:], inference=True))
    torch.testing.assert_close(drawn, trained)


def test_the_published_state_dict_is_kept_when_places_are_off():
    plain, with_places = (set(SubjectFuser("block", 16, 24, 2, 8, places=on).state_dict()) for on in (False, True))
    assert with_places - plain == {"place.weight"}


def test_moving_the_subjects_place_alone_moves_what_the_fuser_returns():
    torch.manual_seed(0)
    fuser = SubjectFuser("block", 32, 24, 1, 32, places=True)
    with torch.no_grad():
        fuser.alpha_attn.fill_(1.0)
    image, tokens = torch.randn(1, 16, 32), torch.randn(1, 4, 24)
    corners = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]])
    first, second = (fourier_box_features(patch_boxes(box, 4, (4, 4)))[None] for box in corners)
    condition = SubjectCondition(tokens, None, torch.ones(1), torch.zeros(1, 1, 4, 4), token_places=first)
    assert not torch.allclose(fuser(image, condition), fuser(image, replace(condition, token_places=second)))
