"""The smallest frozen models with random weights, saved in their real formats, and settings of a run on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
import yaml
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from model.image_encoder import SubjectImageEncoder
from model.tokenizer import train_tokenizer
from tests.model.tiny_tokenizer import CAPTIONS
from tests.train.tiny_runs import SIZES
from train.data.frozen_encoders import FrozenEncoders
from train.settings import DataSettings, TrainSettings

CPU = torch.device("cpu")


def vae(seed: int = 0) -> AutoencoderKL:
    """An autoencoder of 4 latent channels at an eighth of the side."""
    torch.manual_seed(seed)
    return AutoencoderKL(**SIZES["architecture"]["vae"]).eval()


def clip(seed: int = 0, vocabulary: int = 600) -> open_clip.CLIP:
    """An open_clip model whose image tower takes 32 pixels."""
    torch.manual_seed(seed)
    config = SIZES["architecture"]["clip"]
    return open_clip.CLIP(**config | {"text_cfg": config["text_cfg"] | {"vocab_size": vocabulary}})


def encoders(vae_seed: int = 0, clip_seed: int = 0, **options: Any) -> FrozenEncoders:
    """Both, as the data pass through them."""
    tower = SubjectImageEncoder.from_open_clip(clip(clip_seed), SIZES["architecture"]["clip"])
    return FrozenEncoders(vae(vae_seed), tower, CPU, **options)


def save_frozen_models(runs: Path) -> None:
    """Exports of runs `vae` and `clip`, and the model file."""
    vae().save_pretrained(runs / "vae" / "export")
    folder = runs / "clip" / "export"
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(CAPTIONS, 600, folder / "tokenizer", model_max_length=56)
    model = clip(vocabulary=len(tokenizer))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    config = SIZES["architecture"]["clip"]
    config = config | {"text_cfg": config["text_cfg"] | {"vocab_size": len(tokenizer)}}
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": pixels}))
    tokenizer.save_pretrained(folder / "tokenizer")
    (runs / "sizes.yaml").write_text(yaml.safe_dump(SIZES))


def base_run(runs: Path, data: DataSettings, **values: Any) -> TrainSettings:
    """A run of task base on these models."""
    return TrainSettings(
        task="base", name="base", runs_dir=runs, model=runs / "sizes.yaml", inputs={"vae": "vae", "clip": "clip"},
        steps=3, batch_size=4, data=data, **values,
    )  # fmt: skip
