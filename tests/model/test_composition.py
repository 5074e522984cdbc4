"""model/composition.py: base and adapter as one network, at the start, in training and at inference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.attention_maps import AttentionMapRecorder, install_recording, supervised_layers
from model.composition import SubjectDiffusionModel
from model.inputs import Drop, SubjectInputs, drop_conditions
from model.text_fusion import encode_prompt
from tests.model.tiny import LATENTS, tiny_adapter, tiny_subject_model, tiny_text_encoder, tiny_unet
from tests.model.tiny_inputs import tiny_inputs

LATENT = torch.randn(2, *LATENTS, generator=torch.Generator().manual_seed(5))
TIMESTEPS = torch.tensor([10, 700])
SIZE = (LATENTS[1], LATENTS[2])


@pytest.fixture
def model() -> SubjectDiffusionModel:
    return tiny_subject_model()


@pytest.fixture
def inputs() -> SubjectInputs:
    return tiny_inputs()


def drop_all(inputs: SubjectInputs, kind: Drop) -> SubjectInputs:
    return drop_conditions(inputs, torch.full((len(inputs),), int(kind)))


def without_slots(inputs: SubjectInputs) -> SubjectInputs:
    """Plain captions with S = 0, as the pipeline makes them."""
    per_subject = ("placeholder_positions", "noun_ids", "pooled", "patches", "reference_keep", "subject_keep", "boxes")
    empty = {name: getattr(inputs, name)[:, :0] for name in (*per_subject, "strength")}
    return replace(inputs, input_ids=inputs.plain_input_ids, **empty)


@torch.no_grad()
def predict(model: SubjectDiffusionModel, inputs: SubjectInputs, **options) -> torch.Tensor:
    return model.denoise(LATENT, TIMESTEPS, *model.encode(inputs, SIZE, **options))


def gradients(model: SubjectDiffusionModel, inputs: SubjectInputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(LATENT, TIMESTEPS, inputs).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# At the start


@torch.no_grad()
@pytest.mark.parametrize("zero_start", ["gates", "outputs"])
def test_at_initialisation_the_output_is_the_bases_given_the_same_text_states(inputs, zero_start):
    model = tiny_subject_model(awake=False, zero_start=zero_start)
    context, condition = model.encode(inputs, SIZE)
    plain = tiny_unet()(LATENT, TIMESTEPS, context).sample
    torch.testing.assert_close(model.denoise(LATENT, TIMESTEPS, context, condition), plain, atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_subjects_it_is_plain_text_to_image(model, inputs):
    plain = tiny_text_encoder()(inputs.plain_input_ids).last_hidden_state
    expected = tiny_unet()(LATENT, TIMESTEPS, plain).sample
    for nothing in (drop_all(inputs, Drop.SUBJECTS), without_slots(inputs)):
        torch.testing.assert_close(predict(model, nothing), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(predict(model, nothing, inference=True), expected, atol=1e-5, rtol=0)


def test_all_strengths_0_equal_no_subjects(model, inputs):
    off = replace(
        drop_all(inputs, Drop.SUBJECTS), subject_keep=inputs.subject_keep, strength=torch.zeros_like(inputs.strength)
    )
    torch.testing.assert_close(predict(model, off), predict(model, without_slots(inputs)), atol=1e-6, rtol=0)


def test_beta_0_leaves_the_text_and_the_location_only(model, inputs):
    quiet = predict(model, inputs, beta=0.0)
    with torch.no_grad():
        for fuser in model.adapter.fusers.values():
            fuser.alpha_attn.zero_()
            fuser.alpha_dense.zero_()
    torch.testing.assert_close(quiet, predict(model, inputs), atol=1e-6, rtol=0)


def test_the_pictures_of_a_subject_depend_on_its_references(model, inputs):
    other = replace(inputs, patches=inputs.patches.flip(-1))
    assert not torch.allclose(predict(model, inputs), predict(model, other), atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"fusion": "after", "fusion_scale": 0.4}])
def test_concepts_stand_at_the_placeholders(inputs, options):
    model = tiny_subject_model(**options)
    concepts = model.adapter.concepts(inputs, model.text_encoder.embeddings.token_embedding)
    expected = encode_prompt(
        model.text_encoder, inputs.input_ids, concepts, inputs.placeholder_positions,
        fusion=options.get("fusion", "before"), scale=options.get("fusion_scale", 1.0),
    )  # fmt: skip
    assert torch.equal(model.encode(inputs, SIZE)[0], expected)


# Inference


@pytest.mark.parametrize("kind", list(Drop))
def test_the_inference_form_equals_the_training_form_for_every_branch(model, inputs, kind):
    branch = drop_all(inputs, kind)
    with torch.no_grad():
        trained = model(LATENT, TIMESTEPS, branch)
    torch.testing.assert_close(predict(model, branch, inference=True), trained, atol=1e-5, rtol=0)


def test_inference_caches_keys_and_values_and_training_does_not(model, inputs):
    assert set(model.encode(inputs, SIZE, inference=True)[1].key_values) == set(model.adapter.fusers)
    assert not model.encode(inputs, SIZE)[1].key_values


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_it_runs_in_bfloat16(model, inputs, inference, autocast):
    mixed = drop_conditions(inputs, torch.tensor([int(Drop.NOTHING), int(Drop.ALL)]))
    expected, latents = predict(model, mixed), LATENT
    if not autocast:
        model.bfloat16()
        latents = LATENT.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        low = model.denoise(latents, TIMESTEPS, *model.encode(mixed, SIZE, inference=inference))
    torch.testing.assert_close(low.float(), expected, atol=0.1, rtol=0)


def test_rows_of_a_batch_do_not_depend_on_one_another(model, inputs):
    mixed = drop_conditions(inputs, torch.tensor([int(Drop.NOTHING), int(Drop.ALL)]))
    together = predict(model, mixed, inference=True)
    torch.testing.assert_close(together[0], predict(model, inputs)[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(together[1], predict(model, drop_all(inputs, Drop.ALL))[1], atol=1e-5, rtol=0)


def test_other_cross_attention_arguments_are_kept_beside_the_condition(model, inputs):
    install_recording(model.unet)
    recorder = AttentionMapRecorder(torch.zeros(2, 2, inputs.input_ids.shape[1]))
    with torch.no_grad():
        recorded = model(LATENT, TIMESTEPS, inputs, recorder=recorder)
    assert set(recorder.maps) == set(supervised_layers(model.unet))
    torch.testing.assert_close(recorded, predict(model, inputs), atol=1e-5, rtol=0)


# Training


def test_gradients_reach_exactly_the_named_parameters(model, inputs):
    names = model.set_trainable([r"unet\..*\.attn2\.to_[kv]\.weight", r"text_encoder\..*", r"adapter\..*"])
    # Row 0 knows the place, row 1 does not: box features and null feature are both used.
    reached = gradients(model, replace(inputs, location_keep=torch.tensor([True, False])))
    assert set(reached) == set(names)
    silent = {name for name, gradient in reached.items() if not gradient.any()}
    # A key's bias moves all logits of a query alike, so that softmax never sees it.
    assert all(name.startswith("text_encoder.") and name.endswith("k_proj.bias") for name in silent)


@pytest.mark.parametrize("kind", list(Drop))
def test_every_parameter_takes_part_in_every_step(model, inputs, kind):
    reached = gradients(model, drop_all(inputs, kind))
    assert set(reached) == {name for name, _ in model.named_parameters()}
    assert all(gradient.isfinite().all() for gradient in reached.values())


@pytest.mark.parametrize("kind", [Drop.NOTHING, Drop.LOCATION])
def test_gradients_are_the_same_with_checkpointing_of_activations(model, inputs, kind):
    branch = drop_all(inputs, kind)
    expected = gradients(model.train(), branch)
    model.unet.enable_gradient_checkpointing()
    for name, gradient in gradients(model, branch).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-5)


def test_set_trainable_names_what_matched_in_full(model):
    names = model.set_trainable([r"unet\.conv_in\..*", r"adapter\.concept\.0\.weight"])
    assert names == ["unet.conv_in.weight", "unet.conv_in.bias", "adapter.concept.0.weight"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names


def test_a_pattern_that_matches_nothing_is_refused_by_name(model):
    with pytest.raises(ValueError, match=r"'unet\\.conv_im.*matches no parameter"):
        model.set_trainable([r"adapter\..*", r"unet\.conv_im\..*"])


def test_a_pattern_that_is_no_regular_expression_is_refused(model):
    with pytest.raises(ValueError, match="no regular expression"):
        model.set_trainable(["unet.(*"])


def test_a_text_encoder_of_another_width_is_refused():
    unet = tiny_unet()
    adapter = tiny_adapter(unet)
    adapter.register_to_config(text_dim=32)
    with pytest.raises(ValueError, match="24 wide.*made for 32"):
        SubjectDiffusionModel(unet, tiny_text_encoder(), adapter)
