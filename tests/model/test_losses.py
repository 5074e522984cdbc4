"""model/losses.py: attention-map loss, diffusion target, weights by noise level. Numbers are worked out by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from model.losses import attention_map_loss, diffusion_target, snr_weights


def one_map(values: list[float]) -> dict[str, torch.Tensor]:
    """One layer, one row, one head, one subject."""
    return {"layer": torch.tensor(values).view(1, 1, 1, -1)}


LEFT_HALF = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).view(1, 1, 2, 2)
KEPT = torch.tensor([[True]])


# --- attention maps


def test_balanced_is_mean_outside_minus_mean_inside() -> None:
    # inside: 0.8 and 0.6, outside: 0.1 and 0.3
    loss = attention_map_loss(one_map([0.8, 0.1, 0.6, 0.3]), LEFT_HALF, KEPT)
    assert loss.item() == pytest.approx(0.2 - 0.7)


def test_absolute_is_the_mean_distance_to_the_mask() -> None:
    loss = attention_map_loss(one_map([0.8, 0.1, 0.6, 0.3]), LEFT_HALF, KEPT, kind="absolute")
    assert loss.item() == pytest.approx((0.2 + 0.1 + 0.4 + 0.3) / 4)


def test_masks_shrink_by_area() -> None:
    fine = torch.zeros(1, 1, 4, 4)
    fine[..., :2, :1] = 1  # upper left quarter: half covered
    loss = attention_map_loss(one_map([0.8, 0.2, 0.2, 0.2]), fine, KEPT)
    # the mask is 0.5 0 0 0: inside 0.8, outside (0.5 * 0.8 + 3 * 0.2) / 3.5
    assert loss.item() == pytest.approx((0.4 + 0.6) / 3.5 - 0.8)


def test_wide_pictures_have_wide_layers() -> None:
    wide = torch.zeros(1, 1, 4, 16)
    wide[..., :4] = 1  # left quarter
    values = torch.zeros(2, 8)
    values[:, :2] = 1
    assert attention_map_loss(one_map(values.flatten().tolist()), wide, KEPT).item() == pytest.approx(-1)


def test_layers_count_alike_whatever_their_size() -> None:
    maps = {
        "small": torch.tensor([1.0, 0.0, 1.0, 0.0]).view(1, 1, 1, 4),
        "large": torch.full((1, 1, 1, 16), 0.5),
    }
    assert attention_map_loss(maps, LEFT_HALF, KEPT).item() == pytest.approx((-1 + 0) / 2)


def test_heads_and_kept_subjects_are_averaged() -> None:
    maps = torch.zeros(1, 2, 2, 4)
    maps[0, :, 0] = torch.tensor([[1.0, 0, 1, 0], [0.5, 0, 0.5, 0]])  # subject 0: -1 and -0.5
    maps[0, :, 1] = torch.tensor([[0.0, 1, 0, 1], [0, 0, 0, 0]])  # subject 1: +1 and 0
    masks = LEFT_HALF.expand(1, 2, 2, 2)
    both = attention_map_loss({"layer": maps}, masks, torch.tensor([[True, True]]))
    first = attention_map_loss({"layer": maps}, masks, torch.tensor([[True, False]]))
    assert both.item() == pytest.approx(((-1 + 1) / 2 + (-0.5 + 0) / 2) / 2)
    assert first.item() == pytest.approx(-0.75)


def test_rows_without_subjects_count_as_zero_and_pass_nothing_on() -> None:
    maps = torch.full((2, 1, 1, 4), float("nan"))
    maps[0] = torch.tensor([1.0, 0.0, 1.0, 0.0])
    maps.requires_grad_()
    loss = attention_map_loss({"layer": maps}, LEFT_HALF.expand(2, 1, 2, 2), torch.tensor([[True], [False]]))
    loss.backward()
    assert loss.item() == pytest.approx(-0.5)
    assert maps.grad[1].abs().max() == 0


def test_no_subjects_in_the_whole_batch_give_zero() -> None:
    assert attention_map_loss(one_map([0.8, 0.1, 0.6, 0.3]), LEFT_HALF, ~KEPT).item() == 0


@pytest.mark.parametrize(("fill", "expected"), [(1.0, -0.45), (0.0, 0.45)])
def test_a_mask_that_fills_the_picture_or_is_empty_stays_finite(fill, expected) -> None:
    loss = attention_map_loss(one_map([0.8, 0.1, 0.6, 0.3]), torch.full((1, 1, 2, 2), fill), KEPT)
    assert loss.item() == pytest.approx(expected)


def test_half_precision_maps_give_a_float32_loss() -> None:
    loss = attention_map_loss({"layer": torch.rand(1, 1, 1, 4).bfloat16()}, LEFT_HALF, KEPT)
    assert loss.dtype == torch.float32


def test_no_maps_or_an_unknown_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="no maps"):
        attention_map_loss({}, LEFT_HALF, KEPT)
    with pytest.raises(ValueError, match="kind 'squared'"):
        attention_map_loss(one_map([0.0] * 4), LEFT_HALF, KEPT, kind="squared")


# --- diffusion


def scheduler(prediction_type: str, **options) -> DDPMScheduler:
    return DDPMScheduler(prediction_type=prediction_type, **options)


def test_the_target_follows_the_schedulers_prediction_type() -> None:
    latents, noise, timesteps = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2), torch.tensor([10, 900])
    alpha_bar = scheduler("epsilon").alphas_cumprod[timesteps].view(2, 1, 1, 1)
    velocity = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    assert torch.equal(diffusion_target(scheduler("epsilon"), latents, noise, timesteps), noise)
    assert torch.equal(diffusion_target(scheduler("sample"), latents, noise, timesteps), latents)
    torch.testing.assert_close(diffusion_target(scheduler("v_prediction"), latents, noise, timesteps), velocity)


def test_without_gamma_all_timesteps_weigh_one() -> None:
    assert torch.equal(snr_weights(scheduler("epsilon"), torch.tensor([0, 999]), None), torch.ones(2))


@pytest.mark.parametrize(
    ("prediction_type", "expected"),
    # SNR 9 at alpha_bar 0.9, SNR 1/3 at alpha_bar 0.25; gamma 5
    [("epsilon", [5 / 9, 1.0]), ("v_prediction", [5 / 10, 0.25]), ("sample", [5.0, 1 / 3])],
)
def test_min_snr_weights(prediction_type, expected) -> None:
    noise_scheduler = scheduler(prediction_type, num_train_timesteps=2)
    noise_scheduler.alphas_cumprod = torch.tensor([0.9, 0.25])
    weights = snr_weights(noise_scheduler, torch.tensor([0, 1]), 5.0)
    torch.testing.assert_close(weights, torch.tensor(expected))


def test_weights_are_finite_at_zero_terminal_snr() -> None:
    noise_scheduler = scheduler("epsilon", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    noise_scheduler.alphas_cumprod[-1] = 0.0
    assert snr_weights(noise_scheduler, torch.tensor([999]), 5.0).item() == 1


def test_an_unknown_prediction_type_is_refused() -> None:
    noise_scheduler = scheduler("epsilon")
    noise_scheduler.register_to_config(prediction_type="flow")
    for call in (lambda t: diffusion_target(noise_scheduler, t, t, t), lambda t: snr_weights(noise_scheduler, t, 5.0)):
        with pytest.raises(ValueError, match="prediction_type 'flow'"):
            call(torch.tensor([0]))
