"""model/sampling.py: guidance and the denoising loop, on the real composed model at tiny size."""

from __future__ import annotations

from dataclasses import fields, replace
from unittest.mock import patch

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.models import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from model.composition import SubjectDiffusionModel
from model.inputs import Drop, SubjectInputs, drop_conditions
from model.sampling import (
    branch_inputs,
    denoise,
    guidance_branches,
    initial_latents,
    joint_guidance,
    separate_guidance,
)
from model.subject_adapter import SubjectAdapter
from tests.model.tiny_inputs import PATCH_WIDTH, PATCHES, POOLED, tiny_inputs
from tests.model.tiny_tokenizer import tiny_tokenizer

STEPS, SHAPE = 4, (2, 4, 8, 8)


def random_weights(module: torch.nn.Module, seed: int) -> None:
    """No zero-initialised gate may hide a branch."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def base_pair(seed: int) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=2, cross_attention_dim=24,
    )  # fmt: skip
    tokenizer = tiny_tokenizer(placeholder=False)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        )  # fmt: skip
    )
    random_weights(unet, seed)
    random_weights(text_encoder, seed + 1)
    return unet.eval(), text_encoder.eval()


@pytest.fixture(scope="module")
def model() -> SubjectDiffusionModel:
    torch.manual_seed(0)
    unet, text_encoder = base_pair(0)
    adapter = SubjectAdapter.from_unet(
        unet, text_dim=24, pooled_dim=POOLED, patch_dim=PATCH_WIDTH, num_patches=PATCHES
    )
    random_weights(adapter, 5)
    return SubjectDiffusionModel(unet, text_encoder, adapter).eval()


@pytest.fixture(scope="module")
def plain() -> tuple[UNet2DConditionModel, CLIPTextModel]:
    return base_pair(10)


@pytest.fixture
def inputs() -> SubjectInputs:
    return tiny_inputs()


@pytest.fixture
def scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False)


@pytest.fixture
def noise(scheduler) -> torch.Tensor:
    return initial_latents(scheduler, SHAPE, steps=STEPS, generator=torch.Generator().manual_seed(3))


def without_subjects(inputs: SubjectInputs) -> SubjectInputs:
    return drop_conditions(inputs, torch.full((len(inputs),), int(Drop.SUBJECTS)))


# --- guidance


def test_separate_guidance_by_hand() -> None:
    eps = separate_guidance(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0), subject_scale=3.0, text_scale=5.0)
    assert eps.item() == 1 + 3 * (2 - 1) + 5 * (4 - 2)


def test_separate_guidance_with_both_scales_one_is_the_full_branch() -> None:
    eps_u, eps_i, eps_t = torch.randn(3, *SHAPE)
    torch.testing.assert_close(separate_guidance(eps_u, eps_i, eps_t, 1.0, 1.0), eps_t)


def test_separate_guidance_with_equal_scales_is_joint_guidance() -> None:
    eps_u, eps_i, eps_t = torch.randn(3, *SHAPE)
    torch.testing.assert_close(separate_guidance(eps_u, eps_i, eps_t, 4.0, 4.0), joint_guidance(eps_u, eps_t, 4.0))


def test_branches_by_kind_of_guidance() -> None:
    assert guidance_branches("separate", subjects=True) == (Drop.ALL, Drop.TEXT, Drop.NOTHING)
    assert guidance_branches("joint", subjects=True) == (Drop.ALL, Drop.NOTHING)
    assert guidance_branches("none", subjects=True) == (Drop.NOTHING,)
    assert guidance_branches("separate", subjects=False) == (Drop.ALL, Drop.SUBJECTS)
    assert guidance_branches("none", subjects=False) == (Drop.SUBJECTS,)


def test_branch_rows_are_the_conditions_dropped_one_branch_after_the_other(inputs) -> None:
    branches = (Drop.ALL, Drop.TEXT, Drop.NOTHING)
    rows = branch_inputs(inputs, branches)
    dropped = [drop_conditions(inputs, torch.full((len(inputs),), int(branch))) for branch in branches]
    for field in fields(SubjectInputs):
        expected = torch.cat([getattr(branch, field.name) for branch in dropped])
        assert torch.equal(getattr(rows, field.name), expected), field.name


@torch.no_grad()
def test_every_inference_branch_is_a_training_case(model, inputs, scheduler, noise) -> None:
    """What each branch predicts equals the training forward on the dropped conditions."""
    predictions: list[torch.Tensor] = []
    real = model.denoise

    def kept(*args, **kwargs):
        predictions.append(real(*args, **kwargs))
        return predictions[-1]

    with patch.object(model, "denoise", kept):
        denoise(model, scheduler, noise, inputs, steps=1)
    timesteps = scheduler.timesteps.expand(len(inputs))
    chunks = predictions[0].chunk(3)
    for chunk, branch in zip(chunks, (Drop.ALL, Drop.TEXT, Drop.NOTHING), strict=True):
        dropped = drop_conditions(inputs, torch.full((len(inputs),), int(branch)))
        torch.testing.assert_close(chunk, model(noise, timesteps, dropped), atol=1e-5, rtol=1e-5)
    assert (chunks[0] - chunks[1]).abs().max() > 1e-3 and (chunks[1] - chunks[2]).abs().max() > 1e-3


# --- the loop


def test_scales_of_one_draw_what_no_guidance_draws(model, inputs, scheduler, noise) -> None:
    unguided = denoise(model, scheduler, noise, inputs, steps=STEPS, guidance="none")
    separate = denoise(model, scheduler, noise, inputs, steps=STEPS, text_scale=1.0, subject_scale=1.0)
    joint = denoise(model, scheduler, noise, inputs, steps=STEPS, text_scale=1.0, guidance="joint")
    torch.testing.assert_close(separate, unguided, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(joint, unguided, atol=1e-4, rtol=1e-4)


def test_both_scales_matter(model, inputs, scheduler, noise) -> None:
    drawn = [
        denoise(model, scheduler, noise, inputs, steps=STEPS, text_scale=text, subject_scale=subject)
        for text, subject in [(2.0, 1.5), (3.0, 1.5), (2.0, 2.5)]
    ]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-3
    assert (drawn[0] - drawn[2]).abs().max() > 1e-3


def test_text_and_subjects_are_encoded_once_a_generation(model, inputs, scheduler, noise) -> None:
    with (
        patch.object(model.text_encoder.encoder, "forward", wraps=model.text_encoder.encoder.forward) as text,
        patch.object(model.adapter, "condition", wraps=model.adapter.condition) as grounding,
        patch.object(model.unet, "forward", wraps=model.unet.forward) as unet,
    ):
        denoise(model, scheduler, noise, inputs, steps=STEPS)
    assert (text.call_count, grounding.call_count, unet.call_count) == (1, 1, STEPS)


@pytest.mark.parametrize("guidance", ["separate", "joint", "none"])
def test_no_subjects_is_plain_text_to_image_in_at_most_two_branches(model, inputs, scheduler, noise, guidance) -> None:
    null = without_subjects(inputs)
    options = {"steps": STEPS, "guidance": guidance}
    with patch.object(model.unet, "forward", wraps=model.unet.forward) as unet:
        all_off = denoise(model, scheduler, noise, null, **options)
    assert unet.call_args.args[0].shape[0] == len(inputs) * (1 if guidance == "none" else 2)
    captions = tiny_inputs((("a dog next to a mug", ()), ("a teddy bear in the snow", ())))
    assert captions.subject_keep.shape == (2, 0)
    torch.testing.assert_close(denoise(model, scheduler, noise, captions, **options), all_off, atol=1e-5, rtol=1e-5)


def test_beta_zero_switches_the_fusers_off_but_not_the_rest(model, inputs, scheduler, noise) -> None:
    drawn = [denoise(model, scheduler, noise, inputs, steps=1, beta=beta) for beta in (0.0, 1.0)]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-4


def test_rows_do_not_influence_each_other(model, inputs, scheduler) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = denoise(
        model, scheduler, initial_latents(scheduler, SHAPE, steps=STEPS, generator=generators), inputs, steps=STEPS
    )
    second = replace(inputs, **{field.name: getattr(inputs, field.name)[1:] for field in fields(inputs)})
    start = initial_latents(scheduler, (1, *SHAPE[1:]), steps=STEPS, generator=torch.Generator().manual_seed(2))
    alone = denoise(model, scheduler, start, second, steps=STEPS)
    torch.testing.assert_close(alone, both[1:], atol=1e-4, rtol=1e-4)


def test_what_on_step_returns_replaces_the_latents(model, inputs, scheduler, noise) -> None:
    seen: list[tuple[int, int]] = []

    def watch(index: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor | None:
        seen.append((index, int(timestep)))
        return torch.zeros_like(latents) if index == STEPS - 1 else None

    drawn = denoise(model, scheduler, noise, inputs, steps=STEPS, on_step=watch)
    assert seen == list(enumerate(scheduler.timesteps.tolist()))
    assert drawn.abs().max() == 0


# --- when subjects are drawn


def test_outside_its_range_the_subject_is_dropped_as_in_training(model, inputs, scheduler, noise) -> None:
    never = denoise(model, scheduler, noise, inputs, steps=STEPS, subject_range=(0.0, 0.0))
    null = denoise(model, scheduler, noise, without_subjects(inputs), steps=STEPS)
    assert torch.equal(never, null)


def test_the_subject_range_counts_shares_of_the_steps(model, inputs, scheduler, noise) -> None:
    with patch.object(model.unet, "forward", wraps=model.unet.forward) as unet:
        denoise(model, scheduler, noise, inputs, steps=STEPS, subject_range=(0.25, 0.75))
    assert [call.args[0].shape[0] // len(inputs) for call in unet.call_args_list] == [2, 3, 3, 2]


def test_after_subject_until_only_the_plain_pair_is_called(model, plain, inputs, scheduler, noise) -> None:
    unet, text_encoder = plain
    with (
        patch.object(model.unet, "forward", wraps=model.unet.forward) as own_unet,
        patch.object(unet, "forward", wraps=unet.forward) as plain_unet,
        patch.object(text_encoder.encoder, "forward", wraps=text_encoder.encoder.forward) as plain_text,
    ):
        denoise(model, scheduler, noise, inputs, steps=STEPS, plain=plain, subject_until=0.75)
    assert (own_unet.call_count, plain_unet.call_count, plain_text.call_count) == (3, 1, 1)
    assert "cross_attention_kwargs" not in plain_unet.call_args.kwargs


def test_subject_until_one_never_touches_the_plain_pair(model, plain, inputs, scheduler, noise) -> None:
    with patch.object(plain[1].encoder, "forward", side_effect=AssertionError):
        denoise(model, scheduler, noise, inputs, steps=STEPS, plain=plain, subject_until=1.0)


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        diffusers.PNDMScheduler(steps_offset=1, skip_prk_steps=True),
        diffusers.EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading"),
        diffusers.DPMSolverMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_plain_pair_draws_what_the_stock_pipeline_draws(model, plain, inputs, scheduler) -> None:
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    scaled = initial_latents(scheduler, SHAPE, steps=STEPS, generator=torch.Generator().manual_seed(3))
    drawn = denoise(model, scheduler, scaled, inputs, steps=STEPS, plain=plain, subject_until=0.0, text_scale=3.0)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4), text_encoder=plain[1], unet=plain[0],
        tokenizer=tiny_tokenizer(placeholder=False), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(
        ["a dog next to a mug", "a teddy bear in the snow"], num_inference_steps=STEPS, guidance_scale=3.0,
        latents=start, output_type="latent", height=16, width=16,
    ).images  # fmt: skip
    torch.testing.assert_close(drawn, stock, atol=1e-4, rtol=1e-4)


# --- schedulers


@pytest.mark.parametrize(
    "name",
    ["DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
     "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler"],
)  # fmt: skip
def test_any_scheduler_draws_the_same_twice(model, inputs, name) -> None:
    scheduler = getattr(diffusers, name)()

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        latents = initial_latents(scheduler, SHAPE, steps=STEPS, generator=generator)
        return denoise(model, scheduler, latents, inputs, steps=STEPS, text_scale=2.0, generator=generator)

    first = draw()
    assert first.shape == SHAPE and first.isfinite().all()
    assert torch.equal(draw(), first)


def test_initial_latents_have_the_schedulers_noise_level() -> None:
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading")
    latents = initial_latents(scheduler, (4, 4, 32, 32), steps=7, generator=torch.Generator().manual_seed(0))
    scheduler.set_timesteps(7)
    assert latents.std().item() == pytest.approx(float(scheduler.init_noise_sigma), rel=0.03)
    assert float(scheduler.init_noise_sigma) > 5


def test_v_prediction_is_left_to_the_scheduler(model, inputs, noise) -> None:
    drawn = denoise(model, DDIMScheduler(prediction_type="v_prediction"), noise, inputs, steps=STEPS)
    assert drawn.isfinite().all()


# --- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps 0: must be at least 1"),
        ({"guidance": "both"}, "guidance 'both': expected"),
        ({"subject_range": (0.8, 0.2)}, "subject_range"),
        ({"subject_until": 1.5}, "subject_until 1.5: expected a share"),
        ({"subject_until": 0.5}, "give the plain base"),
    ],
)
def test_impossible_settings_are_refused(model, inputs, scheduler, noise, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        denoise(model, scheduler, noise, inputs, **{"steps": STEPS, **options})


def test_a_wrong_number_of_rows_is_refused(model, inputs, scheduler, noise) -> None:
    with pytest.raises(ValueError, match="latents: 1 rows for 2 prompts"):
        denoise(model, scheduler, noise[:1], inputs, steps=STEPS)
