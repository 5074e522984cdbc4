"""A tiny model of the real classes in the real formats: a plain base and trained parts over it, on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from model.composition import SubjectDiffusionModel
from model.image_encoder import SubjectImageEncoder
from model.saving import save_subject_model
from model.subject_adapter import SubjectAdapter
from tests.model.tiny_tokenizer import tiny_tokenizer

TRAINED = (r"unet\..*\.attn2\.to_[kv]\.weight", r"text_encoder\..*", r"adapter\..*")
TEXT_WIDTH = 32
PROMPT_LENGTH = 32


@dataclass(frozen=True)
class TinyModel:
    """Folders of one model."""

    base: Path  # plain diffusers folder
    subject: Path  # trained parts over `base`


def _build_base(folder: Path) -> None:
    tokenizer = tiny_tokenizer(PROMPT_LENGTH, placeholder=False)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PROMPT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=64,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _build_subject(base: Path, folder: Path) -> None:
    """Trained parts that differ from the base and whose gates are open, so that subjects show."""
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    encoder = SubjectImageEncoder.from_open_clip(open_clip.model.CLIP(**config), config)
    adapter = SubjectAdapter.from_unet(
        unet,
        text_dim=TEXT_WIDTH,
        pooled_dim=encoder.pooled_dim,
        patch_dim=encoder.patch_dim,
        num_patches=encoder.num_patches,
    )
    model = SubjectDiffusionModel(unet, text_encoder, adapter)
    trained = model.set_trainable(TRAINED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    save_subject_model(
        folder,
        model,
        base=str(base),
        trained=trained,
        parts="trained",
        image_encoder=encoder,
        card="tiny",
    )


def build_tiny_model(root: Path) -> TinyModel:
    """Write base and trained parts below `root`; seeded, so that every call writes the same weights."""
    model = TinyModel(root / "base", root / "subject")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _build_base(model.base)
        _build_subject(model.base, model.subject)
    return model
