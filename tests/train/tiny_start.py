"""A tiny Stable Diffusion folder and a tiny image encoder on disk, and runs of the diffusion tasks that start there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import torch
import yaml
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from data_pipeline.settings import load_settings
from model.image_encoder import SubjectImageEncoder
from tests.model.tiny_tokenizer import tiny_tokenizer
from train.data.diffusion_batch import DiffusionBatch
from train.settings import REPOSITORY, TrainSettings
from train.tasks.subject import SubjectTask

TEXT_WIDTH, PROMPT_LENGTH = 16, 64
CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}
UNET: dict[str, Any] = {
    "sample_size": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def write_tiny_start(root: Path, prediction_type: str = "epsilon") -> Path:
    """`root`/sd: a folder as those of Stable Diffusion are, with PNDM; `root`/encoder; `root`/sizes.yaml names both."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = tiny_tokenizer(PROMPT_LENGTH, placeholder=False)
        text = CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=PROMPT_LENGTH, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8,) * 4, norm_num_groups=4, sample_size=32,
        )  # fmt: skip
        scheduler = PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
            set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
        )  # fmt: skip
        StableDiffusionPipeline(
            vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=UNet2DConditionModel(**UNET),
            scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        ).save_pretrained(root / "sd")  # fmt: skip
        SubjectImageEncoder.from_open_clip(open_clip.CLIP(**CLIP), CLIP).save_pretrained(root / "encoder")
    trained = [r"unet\..*\.attn2\.to_[kv]\.weight", r"text_encoder\..*", r"adapter\..*"]
    adapter = {"patch_places": True, "zero_start": "outputs"}  # as the toybox has them
    sizes = {"base": str(root / "sd"), "adapter": adapter, "trained": trained}
    (root / "sizes.yaml").write_text(yaml.safe_dump(sizes))
    return root


def start_settings(root: Path, *overrides: str, files: tuple[str, ...] = (), task: str = "subject") -> TrainSettings:
    """Settings of a run on `write_tiny_start`; `files` are overlays below configs/train, over toybox/subject.yaml."""
    names = ["toybox/subject.yaml", *files] if task == "subject" else [f"toybox/{task}.yaml", *files]
    small = [
        f"model={root / 'sizes.yaml'}",
        f"runs_dir={root / 'runs'}",
        f"inputs={{clip: {root / 'encoder'}}}",
        "steps=2",
        "batch_size=4",
        "options={validation_steps: 2}",
        "data.size=32",
        "data.workers=0",
        "data.cache_scenes=16",
    ]
    paths = [REPOSITORY / "configs" / "train" / name for name in names]
    # A section merges, so the inputs of the file, runs of the toybox, are taken out afterwards.
    settings = load_settings(TrainSettings, paths, [*small, *overrides])
    return settings.model_copy(
        update={"inputs": {k: v for k, v in settings.inputs.items() if not v.startswith("toybox/")}}
    )


def batch_of(task: SubjectTask, numbers: range) -> DiffusionBatch:
    """The batch of these samples, as the loop gets it."""
    return task.batch(task.collate([task.dataset[number] for number in numbers]))
