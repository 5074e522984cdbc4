"""From noise to latents: guidance and the denoising loop, for any diffusers scheduler.

Trainer (validation grids) and pipeline both draw with `denoise`. Guidance with two conditions: InstructPix2Pix, arXiv
2211.09800, equation 3, with eps_u, eps_i, eps_t as `inputs.Drop` names them, so that every branch is a training case.
Handing over to the plain base after a share of the steps: Subject-Diffusion, arXiv 2307.11410 (interpolation).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from diffusers.models import UNet2DConditionModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPTextModel

from model.composition import SubjectDiffusionModel
from model.inputs import Drop, SubjectInputs, drop_conditions
from model.learned_words import LearnedWords

Guidance = Literal["separate", "joint", "none"]
OnStep = Callable[[int, Tensor, Tensor], Tensor | None]
NoisePredictor = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # latents, timestep -> one prediction a branch


def separate_guidance(eps_u: Tensor, eps_i: Tensor, eps_t: Tensor, subject_scale: float, text_scale: float) -> Tensor:
    """eps = eps_u + s_i (eps_i - eps_u) + s_t (eps_t - eps_i); all (B, C, h, w)."""
    return eps_u + subject_scale * (eps_i - eps_u) + text_scale * (eps_t - eps_i)


def joint_guidance(eps_u: Tensor, eps_t: Tensor, text_scale: float) -> Tensor:
    """eps = eps_u + s_t (eps_t - eps_u); all (B, C, h, w)."""
    return eps_u + text_scale * (eps_t - eps_u)


def guidance_branches(guidance: Guidance, subjects: bool) -> tuple[Drop, ...]:
    """Which conditions each branch of the UNet batch loses, in the order eps_u, eps_i, eps_t.

    Without subjects eps_i equals eps_u, so that separate guidance needs two branches only.
    """
    full = Drop.NOTHING if subjects else Drop.SUBJECTS
    if guidance == "none":
        return (full,)
    if guidance == "joint" or not subjects:
        return (Drop.ALL, full)
    return (Drop.ALL, Drop.TEXT, full)


def branch_inputs(inputs: SubjectInputs, branches: Sequence[Drop]) -> SubjectInputs:
    """Conditions of the whole UNet batch: B rows of the first branch, B of the second, …"""
    drop = torch.tensor([int(branch) for branch in branches], device=inputs.input_ids.device)
    return drop_conditions(inputs.repeat_rows(len(branches)), drop.repeat_interleave(len(inputs)))


def initial_latents(
    scheduler: Any,
    shape: tuple[int, int, int, int],
    generator: torch.Generator | list[torch.Generator] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    steps: int,
) -> Tensor:
    """Noise at the scheduler's first level, to be handed to `denoise`.

    Args:
        scheduler: any diffusers scheduler; its noise level can depend on the number of steps, so they are set.
        shape: (B, C, h, w).
        generator: one for the batch, or one a row (a row then draws the same whatever the batch).
        device, dtype: of the latents.
        steps: as for `denoise`.
    Returns:
        (B, C, h, w) noise of standard deviation `scheduler.init_noise_sigma`.
    """
    scheduler.set_timesteps(steps, device=device)
    noise = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=dtype)
    return noise * scheduler.init_noise_sigma


@torch.no_grad()
def denoise(
    model: SubjectDiffusionModel,
    scheduler: Any,
    latents: Tensor,
    inputs: SubjectInputs,
    *,
    steps: int,
    text_scale: float = 7.5,
    subject_scale: float = 1.5,
    guidance: Guidance = "separate",
    beta: float = 1.0,
    subject_range: tuple[float, float] = (0.0, 1.0),
    plain: tuple[UNet2DConditionModel, CLIPTextModel] | None = None,
    subject_until: float = 1.0,
    eta: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Draw B pictures' latents. Text and subjects are encoded once a generation, not once a step.

    Args:
        model: UNet, text encoder and adapter.
        scheduler: any diffusers scheduler.
        latents: (B, C, h, w) from `initial_latents`.
        inputs: conditions of the B pictures; `empty_input_ids` is the negative prompt. No subjects (S = 0, or none
            kept) gives plain text-to-image.
        steps: number of denoising steps.
        text_scale, subject_scale: s_t and s_i of the guidance; joint guidance uses s_t only, none uses neither.
        guidance: three branches, two, or only the full one.
        beta: scale of the adapter's residuals.
        subject_range: shares of the steps, from (included) and until (excluded), in which subjects are drawn; outside,
            the model draws the plain caption (`Drop.SUBJECTS`, a training case too).
        plain: UNet and text encoder of the plain base; needed when `subject_until` < 1.
        subject_until: share of the steps after which the plain base draws the plain caption.
        eta, generator: passed to schedulers that take them.
        on_step: called after each step with its index, timestep and latents; what it returns replaces the latents.
    Returns:
        (B, C, h, w) latents, still scaled as the UNet sees them.
    """
    _check(latents, inputs, steps, guidance, subject_range, subject_until, plain)
    has_subjects = bool(inputs.subject_keep.any())
    guide = partial(_guide, text_scale=text_scale, subject_scale=subject_scale)
    step_options = _accepted(scheduler.step, {"eta": eta, "generator": generator})
    latent_size = (latents.shape[-2], latents.shape[-1])
    predictors: dict[str, NoisePredictor] = {}  # made when first needed, kept for the steps that follow

    scheduler.set_timesteps(steps, device=latents.device)
    for index, timestep in enumerate(scheduler.timesteps):
        share = index / len(scheduler.timesteps)  # of the calls: some schedulers make several a step
        drawn_by = _drawn_by(share, has_subjects, subject_range, subject_until)
        if drawn_by not in predictors:
            if drawn_by == "plain":
                assert plain is not None
                predictors[drawn_by] = _plain_predictor(*plain, model.words, inputs, guidance, latent_size)
            else:
                predictors[drawn_by] = _subject_predictor(
                    model, branch_inputs(inputs, guidance_branches(guidance, drawn_by == "subjects")), latent_size, beta
                )
        scaled = scheduler.scale_model_input(latents, timestep)  # (B, C, h, w)
        prediction = guide(predictors[drawn_by](scaled, timestep)).to(latents.dtype)  # (B, C, h, w)
        latents = scheduler.step(prediction, timestep, latents, **step_options, return_dict=False)[0]
        if on_step is not None:
            replaced = on_step(index, timestep, latents)
            latents = latents if replaced is None else replaced
    return latents


def _drawn_by(
    share: float,
    has_subjects: bool,
    subject_range: tuple[float, float],
    subject_until: float,
) -> Literal["subjects", "caption", "plain"]:
    """Who draws the step that begins after this share of the steps."""
    if share >= subject_until:
        return "plain"
    return "subjects" if has_subjects and subject_range[0] <= share < subject_range[1] else "caption"


def _subject_predictor(
    model: SubjectDiffusionModel,
    inputs: SubjectInputs,
    latent_size: tuple[int, int],
    beta: float,
) -> NoisePredictor:
    """Encode the branches (rows of `inputs`) now; the function made of it runs the UNet."""
    context, condition = model.encode(inputs, latent_size, beta=beta, inference=True)  # (rows, L, D)

    def predict(latents: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
        num_branches = len(inputs) // len(latents)
        rows = latents.to(context.dtype).repeat(num_branches, 1, 1, 1)  # (rows, C, h, w)
        return model.denoise(rows, timestep.expand(len(rows)), context, condition).chunk(num_branches)

    return predict


def _plain_predictor(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    words: LearnedWords | None,
    inputs: SubjectInputs,
    guidance: Guidance,
    latent_size: tuple[int, int],
) -> NoisePredictor:
    """The base by itself: its own text encoder on the plain caption (learned words stay), stock UNet call."""
    base = SubjectDiffusionModel(unet, text_encoder, adapter=None)
    base.words = words
    plain = branch_inputs(inputs, guidance_branches(guidance, subjects=False))
    return _subject_predictor(base, plain, latent_size, beta=0.0)


def _guide(predictions: tuple[Tensor, ...], text_scale: float, subject_scale: float) -> Tensor:
    """One prediction from one, two or three branches."""
    if len(predictions) == 3:
        return separate_guidance(*predictions, subject_scale=subject_scale, text_scale=text_scale)
    return joint_guidance(*predictions, text_scale=text_scale) if len(predictions) == 2 else predictions[0]


def _accepted(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options that `function` has a parameter for: schedulers differ in theirs."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


def _check(
    latents: Tensor,
    inputs: SubjectInputs,
    steps: int,
    guidance: str,
    subject_range: tuple[float, float],
    subject_until: float,
    plain: tuple[UNet2DConditionModel, CLIPTextModel] | None,
) -> None:
    if len(latents) != len(inputs):
        raise ValueError(f"latents: {len(latents)} rows for {len(inputs)} prompts; give one a prompt")
    if steps < 1:
        raise ValueError(f"steps {steps}: must be at least 1")
    if guidance not in ("separate", "joint", "none"):
        raise ValueError(f"guidance {guidance!r}: expected 'separate', 'joint' or 'none'")
    if not 0 <= subject_range[0] <= subject_range[1] <= 1:
        raise ValueError(f"subject_range {subject_range}: expected two shares of the steps, 0 <= start <= end <= 1")
    if not 0 <= subject_until <= 1:
        raise ValueError(f"subject_until {subject_until}: expected a share of the steps, 0..1")
    if subject_until < 1 and plain is None:
        raise ValueError(f"subject_until {subject_until}: give the plain base's UNet and text encoder as `plain`")
