"""Real networks at tiny size, with the widths of `tiny_inputs`: one 16-pixel reference is a 2 x 2 grid of patches."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL
from diffusers.models import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from model.composition import SubjectDiffusionModel
from model.image_encoder import SubjectImageEncoder
from model.subject_adapter import SubjectAdapter
from tests.model.tiny_inputs import PATCH_WIDTH, PATCHES, POOLED
from tests.model.tiny_tokenizer import tiny_tokenizer

TEXT_WIDTH = 24
LATENTS = (4, 8, 8)
CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": POOLED,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": PATCH_WIDTH, "layers": 2, "head_width": 6},
    "text_cfg": {"context_length": 32, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


def tiny_unet(seed: int = 0, **options: Any) -> UNet2DConditionModel:
    """Two levels, 8 x 8 and 4 x 4; five block groups with cross-attention, eight transformer blocks."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "sample_size": LATENTS[1],
        "in_channels": LATENTS[0],
        "out_channels": LATENTS[0],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2,
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT_WIDTH,
    }
    return UNet2DConditionModel(**(settings | options)).eval()


def tiny_text_encoder(seed: int = 1) -> CLIPTextModel:
    """Its vocabulary is that of the tokenizer without placeholder."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(placeholder=False)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return CLIPTextModel(config).eval()


def tiny_clip(seed: int = 2, **options: Any) -> open_clip.CLIP:
    torch.manual_seed(seed)
    return open_clip.CLIP(**(CLIP_CONFIG | options)).eval()


def tiny_image_encoder(seed: int = 2) -> SubjectImageEncoder:
    return SubjectImageEncoder.from_open_clip(tiny_clip(seed), CLIP_CONFIG).eval()


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=LATENTS[0])


def tiny_adapter(unet: UNet2DConditionModel, seed: int = 3, awake: bool = False, **options: Any) -> SubjectAdapter:
    """Untrained, or `awake`: gates, location convolution and null feature away from the zeros they start with."""
    torch.manual_seed(seed)
    adapter = SubjectAdapter.from_unet(
        unet, text_dim=TEXT_WIDTH, pooled_dim=POOLED, patch_dim=PATCH_WIDTH, num_patches=PATCHES, **options
    )
    if awake:
        wake(adapter, seed)
    return adapter.eval()


def wake(module: nn.Module, seed: int = 0) -> None:
    """Move every parameter, so that nothing that starts at zero can hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def tiny_subject_model(awake: bool = True, **options: Any) -> SubjectDiffusionModel:
    unet = tiny_unet()
    return SubjectDiffusionModel(unet, tiny_text_encoder(), tiny_adapter(unet, awake=awake, **options)).eval()
