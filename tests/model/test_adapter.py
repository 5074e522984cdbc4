"""model/subject_adapter/adapter.py: what it makes of subjects, what its switches leave out, its files."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.inputs import SubjectInputs
from model.subject_adapter import SubjectAdapter
from model.subject_adapter.grounding import fourier_box_features
from tests.model.tiny import TEXT_WIDTH, tiny_adapter, tiny_text_encoder, tiny_unet
from tests.model.tiny_inputs import PATCHES, POOLED, tiny_inputs

SIZE = (8, 8)
EMBEDDING = tiny_text_encoder().embeddings.token_embedding


@pytest.fixture(scope="module")
def adapter() -> SubjectAdapter:
    return tiny_adapter(tiny_unet(), awake=True).requires_grad_(False)


@pytest.fixture
def inputs() -> SubjectInputs:
    """Two subjects in the first row, one in the second; two references each."""
    return tiny_inputs()


def noun_embedding(inputs: SubjectInputs, row: int, subject: int) -> torch.Tensor:
    ids = inputs.noun_ids[row, subject]
    return EMBEDDING(ids[ids >= 0]).mean(dim=0).detach()


# Subject tokens


def test_box_features_are_sine_and_cosine_of_eight_bands():
    box = torch.tensor([0.1, 0.2, 0.3, 0.4])
    features = fourier_box_features(box)
    expected = torch.cat([f(100 ** (k / 8) * box) for k in range(8) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(features, expected)
    assert features.shape == (64,)


def test_every_patch_of_every_reference_of_every_subject_is_a_token(adapter, inputs):
    assert adapter.condition(inputs, SIZE).tokens.shape == (2, 2 * 2 * PATCHES, TEXT_WIDTH)


def test_tokens_of_absent_subjects_are_zero_and_masked(adapter, inputs):
    condition = adapter.condition(inputs, SIZE)
    absent = slice(2 * PATCHES, None)  # the second subject of the second row
    assert condition.tokens[1, absent].eq(0).all()
    assert condition.keep[0].all() and condition.keep[1].tolist() == [True] * 2 * PATCHES + [False] * 2 * PATCHES


def test_not_a_number_in_padding_does_not_spread(adapter, inputs):
    inputs.patches[1, 1] = torch.nan
    assert adapter.condition(inputs, SIZE).tokens.isfinite().all()


def test_a_reference_that_is_not_there_is_masked(adapter, inputs):
    inputs.reference_keep[0, 0, 1] = False
    assert not adapter.condition(inputs, SIZE).keep[0, PATCHES : 2 * PATCHES].any()


def test_no_mask_is_made_when_every_token_counts(adapter):
    both = tiny_inputs((("a dog", ("dog",)), ("a mug", ("mug",))))
    condition = adapter.condition(both, SIZE)
    assert condition.keep is None and condition.log_strength is None and condition.token_boxes is None


def test_the_box_changes_the_tokens(adapter, inputs):
    moved = replace(inputs, boxes=inputs.boxes / 2)
    assert not torch.allclose(adapter.condition(inputs, SIZE).tokens, adapter.condition(moved, SIZE).tokens)


def test_an_unknown_location_gives_null_box_features_and_a_mask_of_0(adapter, inputs):
    unknown = replace(inputs, location_keep=torch.tensor([False, True]))
    moved = replace(unknown, boxes=unknown.boxes / 2)
    here, there = adapter.condition(unknown, SIZE), adapter.condition(moved, SIZE)
    assert torch.equal(here.tokens[0], there.tokens[0])
    assert here.location[0].eq(0).all() and here.location[1].ne(0).any()


def test_the_null_box_feature_starts_at_0():
    assert tiny_adapter(tiny_unet()).grounding.null_box.eq(0).all()


# Rows, strengths


def test_a_row_without_subjects_has_factor_0_and_mask_0(adapter, inputs):
    inputs.subject_keep[1] = False
    condition = adapter.condition(inputs, SIZE)
    assert condition.factor.tolist() == [1, 0]
    assert condition.location[1].eq(0).all()


def test_strength_0_everywhere_equals_no_subjects(adapter, inputs):
    off = adapter.condition(replace(inputs, strength=torch.zeros_like(inputs.strength)), SIZE)
    without = adapter.condition(replace(inputs, subject_keep=torch.zeros_like(inputs.subject_keep)), SIZE)
    assert torch.equal(off.factor, without.factor) and off.factor.eq(0).all()
    assert torch.equal(off.location, without.location)
    assert torch.equal(off.tokens, without.tokens) and torch.equal(off.keep, without.keep)


def test_a_subject_of_strength_0_is_masked_and_leaves_no_box(adapter, inputs):
    inputs.strength[0, 1] = 0.0
    inputs.boxes[0] = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 1.0, 1.0]])
    condition = adapter.condition(inputs, SIZE)
    assert not condition.keep[0, 2 * PATCHES :].any()
    assert condition.location[0, 0, 4:, 4:].eq(1).all() and condition.location[0, 0, :4, :4].eq(0).all()


def test_strength_is_added_to_the_keys_as_a_logarithm(adapter, inputs):
    inputs.strength[0] = torch.tensor([0.5, 2.0])
    logarithms = adapter.condition(inputs, SIZE).log_strength[0]
    torch.testing.assert_close(logarithms[: 2 * PATCHES], torch.full((2 * PATCHES,), 0.5).log())
    torch.testing.assert_close(logarithms[2 * PATCHES :], torch.full((2 * PATCHES,), 2.0).log())


def test_inference_names_the_rows_with_subjects(adapter, inputs):
    inputs.subject_keep[0] = False
    assert adapter.condition(inputs, SIZE, skip_null_rows=True).active_rows.tolist() == [1]


def test_inference_skips_nothing_when_every_row_has_subjects(adapter, inputs):
    assert adapter.condition(inputs, SIZE, skip_null_rows=True).active_rows is None


def test_keys_and_values_are_cached_for_every_fuser_and_active_row(adapter, inputs):
    inputs.subject_keep[0] = False
    condition = adapter.precompute(adapter.condition(inputs, SIZE, skip_null_rows=True))
    assert set(condition.key_values) == set(adapter.fusers)
    assert all(len(keys) == len(values) == 1 for keys, values in condition.key_values.values())


def test_pictures_without_any_subject_slot_are_null_rows(adapter, inputs):
    per_subject = ("noun_ids", "pooled", "patches", "reference_keep", "subject_keep", "boxes", "strength")
    inputs = replace(inputs, **{name: getattr(inputs, name)[:, :0] for name in per_subject})
    condition = adapter.condition(inputs, SIZE)
    assert condition.tokens.shape == (2, 0, TEXT_WIDTH) and condition.factor.eq(0).all()
    assert adapter.concepts(inputs, EMBEDDING).shape == (2, 0, TEXT_WIDTH)


# Concepts


def test_the_concept_is_the_projection_of_the_pooled_vector(adapter, inputs):
    norm, first, activation, second = adapter.concept
    assert norm.normalized_shape == (POOLED,)
    expected = second(activation(first(norm(inputs.pooled))))
    torch.testing.assert_close(adapter.concepts(inputs, EMBEDDING), expected)


def test_strength_mixes_the_concept_with_the_nouns_embedding(adapter, inputs):
    full = adapter.concepts(inputs, EMBEDDING)[0, 0]
    inputs.strength[0, 0] = 0.25
    mixed = adapter.concepts(inputs, EMBEDDING)[0, 0]
    torch.testing.assert_close(mixed, 0.25 * full + 0.75 * noun_embedding(inputs, 0, 0))


def test_the_embedding_of_a_noun_of_several_tokens_is_their_mean(inputs):
    adapter = tiny_adapter(tiny_unet(), cls_token=False)
    assert (inputs.noun_ids[1, 0] >= 0).sum() > 1
    torch.testing.assert_close(adapter.concepts(inputs, EMBEDDING)[1, 0], noun_embedding(inputs, 1, 0))


def test_concepts_of_absent_subjects_are_finite(adapter, inputs):
    assert adapter.concepts(inputs, EMBEDDING).isfinite().all()


# Ablations and options


def test_without_patch_tokens_there_is_neither_grounding_network_nor_fuser(inputs):
    adapter = tiny_adapter(tiny_unet(), patch_tokens=False)
    assert not [name for name, _ in adapter.named_parameters() if name.startswith(("grounding", "fusers"))]
    assert adapter.condition(inputs, SIZE).tokens.shape == (2, 0, TEXT_WIDTH)
    assert adapter.condition(inputs, SIZE).location.ne(0).any()


def test_without_cls_token_there_is_no_concept_projection():
    assert tiny_adapter(tiny_unet(), cls_token=False).concept is None


def test_without_box_features_the_box_does_not_reach_the_tokens(inputs):
    adapter = tiny_adapter(tiny_unet(), awake=True, box_features=False)
    moved = replace(inputs, boxes=inputs.boxes / 2)
    assert torch.equal(adapter.condition(inputs, SIZE).tokens, adapter.condition(moved, SIZE).tokens)


def test_without_location_the_mask_is_0_and_the_box_still_reaches_the_tokens(inputs):
    adapter = tiny_adapter(tiny_unet(), awake=True, location=False)
    moved = replace(inputs, boxes=inputs.boxes / 2)
    assert adapter.location_convolution is None
    assert adapter.condition(inputs, SIZE).location.eq(0).all()
    assert not torch.equal(adapter.condition(inputs, SIZE).tokens, adapter.condition(moved, SIZE).tokens)


def test_only_inside_box_gives_every_token_its_subjects_box(inputs):
    adapter = tiny_adapter(tiny_unet(), only_inside_box=True)
    boxes = adapter.condition(inputs, SIZE).token_boxes
    torch.testing.assert_close(boxes[0], inputs.boxes[0].repeat_interleave(2 * PATCHES, dim=0))


def test_only_inside_box_leaves_tokens_visible_everywhere_when_the_place_is_unknown(inputs):
    adapter = tiny_adapter(tiny_unet(), only_inside_box=True)
    unknown = replace(inputs, location_keep=torch.tensor([False, True]))
    assert torch.equal(adapter.condition(unknown, SIZE).token_boxes[0, 0], torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_levels_choose_the_block_groups_that_carry_fusers():
    some = tiny_adapter(tiny_unet(), levels=["mid_block", "up_blocks.0"])
    assert {name.split("-attentions")[0] for name in some.fusers} == {"mid_block", "up_blocks-0"}
    assert len(tiny_adapter(tiny_unet()).fusers) == 7


def test_an_unknown_level_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"'down_blocks\.7'.*up_blocks\.1"):
        tiny_adapter(tiny_unet(), levels=["down_blocks.7"])


def test_an_unknown_fusion_is_refused():
    with pytest.raises(ValueError, match="'middle'"):
        tiny_adapter(tiny_unet(), fusion="middle")


# Files


@pytest.mark.parametrize("options", [{}, {"patch_tokens": False}, {"cls_token": False, "location": False}])
def test_it_comes_back_from_its_folder_as_it_was(tmp_path, options):
    adapter = tiny_adapter(tiny_unet(), awake=True, **options)
    adapter.save_pretrained(tmp_path)
    loaded, report = SubjectAdapter.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert loaded.config["blocks"] == adapter.config["blocks"]
    expected = dict(adapter.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected.pop(name))
    assert not expected


def test_it_loads_in_another_precision(tmp_path):
    tiny_adapter(tiny_unet(), awake=True).save_pretrained(tmp_path)
    loaded = SubjectAdapter.from_pretrained(tmp_path, dtype=torch.float16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}
