"""The smallest real models and runs of every task, for the trainer's tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from data_pipeline.settings import load_settings
from train.settings import TrainSettings

SIZES: dict[str, Any] = {
    "base": "tiny",
    "architecture": {
        "vae": {
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "block_out_channels": [8, 8, 8, 8],
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 4,
            "sample_size": 32,
        },
        "clip": {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
            "text_cfg": {"context_length": 56, "vocab_size": 600, "width": 16, "heads": 2, "layers": 1},
        },
        "unet": {
            "sample_size": 4,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "cross_attention_dim": 16,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
        },
        "scheduler": {"num_train_timesteps": 1000, "prediction_type": "v_prediction", "clip_sample": False},
    },
    "trained": [r"unet\..*\.attn2\.to_[kv]\.weight", r"text_encoder\..*", r"adapter\..*"],
}
INPUTS = {"base": {"vae": "vae", "clip": "clip"}, "subject": {"base": "base", "clip": "clip"}}
OPTIONS = {"vae": {"code_steps": 2}, "clip": {"tokenizer_captions": 40}}


def tiny_settings(task: str, runs: Path, **changes: Any) -> TrainSettings:
    """Three steps of a tiny model; `changes` are settings by dotted key with __ for the dot."""
    sizes = runs / "sizes.yaml"
    if not sizes.exists():
        runs.mkdir(parents=True, exist_ok=True)
        sizes.write_text(yaml.safe_dump(SIZES))
    plain: dict[str, Any] = {
        "task": task,
        "name": task,
        "runs_dir": str(runs),
        "model": str(sizes),
        "inputs": INPUTS.get(task, {}),
        "options": OPTIONS.get(task, {}),
        "steps": 3,
        "batch_size": 4,
        "report.log_every": 1,
        "report.checkpoint_every": 2,
        "report.validate_every": 100,
        "report.trackers": [],
        "data.size": 32,
        "data.workers": 0,
        "data.cache_scenes": 8,
    }
    plain |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_settings(
        TrainSettings, [], [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in plain.items()]
    )
