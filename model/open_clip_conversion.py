"""open_clip's text tower as transformers' `CLIPTextModel`: the same numbers under other names.

open_clip keeps queries, keys and values in one matrix and calls its blocks `resblocks`; everything maps one to one, so
the states are equal as long as no padding mask is given (open_clip uses none).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

OPEN_CLIP_CONFIG = "open_clip_config.json"


def load_open_clip(folder: Path) -> tuple[open_clip.CLIP, dict[str, Any]]:
    """A CLIP model from an open_clip folder (`open_clip_config.json`, `open_clip_model.safetensors`), and its
    configuration (`model_cfg`, `preprocess_cfg`).

    Raises:
        ValueError: the folder does not hold such a model.
    """
    try:
        config = json.loads((folder / OPEN_CLIP_CONFIG).read_text())
        model_config = config["model_cfg"]
        state = load_file(folder / "open_clip_model.safetensors")
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: no open_clip folder ({error}); expected config and weights") from error
    clip = open_clip.CLIP(**model_config)
    clip.load_state_dict(state)
    return clip, config


def convert_text_tower(clip: open_clip.CLIP, config: dict[str, Any], tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The text tower of `clip` as a `CLIPTextModel` with equal last hidden states; `config` is its `model_cfg`."""
    text = config["text_cfg"]
    width = text["width"]
    target = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=text["vocab_size"],
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=config["embed_dim"],
            num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"],
            max_position_embeddings=text["context_length"],
            hidden_act="quick_gelu" if config.get("quick_gelu") else "gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    target.load_state_dict(_renamed(clip.state_dict(), text["layers"]))
    return target


def _renamed(source: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    state = {
        "embeddings.token_embedding.weight": source["token_embedding.weight"],
        "embeddings.position_embedding.weight": source["positional_embedding"],
        "final_layer_norm.weight": source["ln_final.weight"],
        "final_layer_norm.bias": source["ln_final.bias"],
    }
    plain = {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for layer in range(layers):
        here, there = f"transformer.resblocks.{layer}", f"encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            for old, new in plain.items():
                state[f"{there}.{new}.{kind}"] = source[f"{here}.{old}.{kind}"]
            packed = source[f"{here}.attn.in_proj_{kind}"].chunk(3)
            for name, value in zip(("q_proj", "k_proj", "v_proj"), packed, strict=True):
                state[f"{there}.self_attn.{name}.{kind}"] = value
    return state
