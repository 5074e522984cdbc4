"""The trainer's small parts: schedule, positions, checkpoints, EMA, pools of scenes, the linear code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from train.data.diffusion_batch import DiffusionBatch
from train.denoising import denoising_loss, mask_weights
from train.engine.schedule import learning_rate_factor
from train.loop import StepBatches
from train.model_card import replace_section
from train.settings import OptimizerSettings
from train.tasks.vae import PatchCode


def test_the_learning_rate_warms_up_and_decays_to_zero() -> None:
    settings = OptimizerSettings(warmup_steps=10, decay="cosine")
    factors = [learning_rate_factor(step, 110, settings) for step in range(111)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0 and factors[60] == pytest.approx(0.5)
    assert factors[110] == pytest.approx(0.0) and max(factors) == 1.0


def test_positions_are_arithmetic_and_disjoint_between_processes() -> None:
    both = [list(StepBatches(range(4), 3, rank, 2)) for rank in (0, 1)]
    seen = sorted(index for batches in both for batch in batches for index in batch)
    assert seen == list(range(24))
    assert list(StepBatches(range(2, 4), 3, 1, 2)) == both[1][2:]


def test_the_patch_code_with_all_components_is_lossless_and_fewer_lose_more() -> None:
    pictures = torch.from_numpy(np.random.default_rng(0).random((40, 3, 8, 8), np.float32)) * 2 - 1
    errors = []
    for components in (48, 24, 6):
        code = PatchCode(pictures, 4, components)
        errors.append(float((code.decode(code.encode(pictures)) - pictures).abs().mean()))
    assert errors[0] < 1e-5 < errors[1] < errors[2]
    assert PatchCode(pictures, 4, 6).encode(pictures).shape == (40, 6, 2, 2)


def test_cells_inside_masks_weigh_more_in_the_denoising_loss() -> None:
    masks = torch.zeros(1, 2, 16, 16)
    masks[0, 0, :8, :8] = 1.0  # the upper left quarter
    masks[0, 1, :8, :8] = 0.5  # twice covered counts once
    masks[0, 1, 8:10, 8:10] = 0.5  # half of one cell of 4 x 4
    batch = DiffusionBatch(torch.zeros(1, 4, 8, 8), *[torch.empty(0)] * 2, masks, torch.empty(0))  # type: ignore[arg-type]
    weights = mask_weights(batch, 4.0)
    assert weights.shape == (1, 1, 8, 8)
    assert (weights[0, 0, :4, :4] == 4).all() and (weights[0, 0, 4:, :4] == 1).all()
    assert weights[0, 0, 4, 4] == 2.5
    scheduler, gamma = DDIMScheduler(prediction_type="v_prediction"), None
    one, two = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    one[..., :4, :4], two[..., 4:, 4:] = 1.0, 1.0
    inside, outside = (
        denoising_loss(scheduler, error, torch.zeros_like(error), torch.zeros_like(error), torch.tensor([5]), gamma, w)
        for error, w in ((one, weights), (two, torch.ones_like(weights)))
    )
    assert inside == pytest.approx(4 * float(outside))


def test_a_cards_section_is_written_before_its_limits_and_then_replaced(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text("# Model\n\nIt draws.\n\n## Measures\n\n1\n\n## Limits\n\nMany.\n")
    replace_section(card, "Scores", "first")
    replace_section(card, "Scores", "second")
    expected = "# Model\n\nIt draws.\n\n## Measures\n\n1\n\n## Scores\n\nsecond\n\n## Limits\n\nMany.\n"
    assert card.read_text() == expected
