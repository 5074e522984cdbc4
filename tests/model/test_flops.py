"""What the adapter costs: a UNet pass at SD 2.1 size, counted by torch on meta tensors (nothing is computed)."""

from __future__ import annotations

import functools

import pytest
import torch
from diffusers.models import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from model.subject_adapter import SubjectAdapter, SubjectCondition

TOKENS_OF_A_SUBJECT = 256  # ViT-H-14 at 224 px: 16 x 16 patches
CONTEXT_WIDTH = 1024


@functools.cache
def flops(num_subjects: int) -> int:
    """Of one row, 64 x 64 latents and 77 text tokens, keys and values precomputed; 0 subjects is the stock UNet."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=CONTEXT_WIDTH,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        )
        latents, context = torch.empty(1, 4, 64, 64), torch.empty(1, 77, CONTEXT_WIDTH)
        arguments = {}
        if num_subjects:
            adapter = SubjectAdapter.from_unet(unet, text_dim=1024, pooled_dim=1024, patch_dim=1280, num_patches=256)
            adapter.attach(unet)
            tokens = torch.empty(1, num_subjects * TOKENS_OF_A_SUBJECT, CONTEXT_WIDTH)
            condition = SubjectCondition(tokens, None, torch.empty(1), torch.empty(1, 1, 64, 64))
            arguments = {"cross_attention_kwargs": {"gligen": {"objs": adapter.precompute(condition)}}}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            unet(latents, torch.tensor(1), context, **arguments)
    return counter.get_total_flops()


def test_the_plain_pass_is_the_known_804_billion():
    assert flops(0) == pytest.approx(804e9, rel=0.001)


@pytest.mark.parametrize(("num_subjects", "limit"), [(1, 1.43), (2, 1.45)])
def test_subjects_cost_at_most_their_share(num_subjects, limit):
    assert 1.3 < flops(num_subjects) / flops(0) <= limit
