"""An open_clip model from a folder or a hub, with its tokenizer; weights are read from safetensors only.

A folder holds `open_clip_config.json` and `open_clip_model.safetensors`. With a `parts.json` beside them the latter
holds only the tensors of its own, and the others come from folders of other models: two towers that serve another
purpose already, joined by heads that were trained on them (locked-image tuning, Zhai et al., LiT, CVPR 2022):

    {"image": {"folder": "../clip", "fingerprint": "…"}, "text": {…}, "tokenizer": "../tokenizer"}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTokenizer

from data_pipeline.errors import UserError
from data_pipeline.record import Provenance
from data_pipeline.stages.pretrained import find_pretrained, hush_transformers, one_line_errors, usable_device

WEIGHTS, CONFIG, PARTS = "open_clip_model.safetensors", "open_clip_config.json", "parts.json"
REPOSITORY = Path(__file__).resolve().parents[3]
Tokenize = Callable[[Sequence[str]], Tensor]  # texts -> (N, L) ids
_TEXT_NAMES = {  # transformers' names of a text tower -> open_clip's
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_LAYER_NAMES = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


@dataclass(frozen=True)
class LoadedClip:
    """A CLIP ready to score."""

    clip: open_clip.CLIP
    tokenize: Tokenize
    mean: Tensor  # (3, 1, 1), `deviation` too: of pictures in 0..1
    deviation: Tensor

    @property
    def image_size(self) -> int:
        """Side of the pictures it takes, pixels."""
        size = self.clip.visual.image_size
        return size if isinstance(size, int) else size[0]

    def pixels(self, crops: Any) -> Tensor:
        """(N, S, S, 3) uint8 -> normalised (N, 3, S, S) on the model's device."""
        pictures = torch.from_numpy(crops).to(self.mean.device).permute(0, 3, 1, 2).to(self.mean.dtype) / 255
        return (pictures - self.mean) / self.deviation


def load_clip(model: str, revision: str | None, device: str, dtype: torch.dtype) -> tuple[LoadedClip, Provenance]:
    """The model of `detect.model`, and what the records say of it.

    Args:
        model: folder (relative to the working directory, else to this repository), hub id, or a name of open_clip's
            list with its tag, ARCHITECTURE/TAG.
        revision: of a hub id.
    Raises:
        UserError: neither, or it does not hold an open_clip model.
    """
    folder = next((str(f) for f in (Path(model).expanduser(), REPOSITORY / model) if f.is_dir()), None)
    found = find_pretrained("detect.model", folder or _hub_id(model), revision)
    with one_line_errors(f"detect.model={model}"):
        loaded = read_folder(found.folder)
    clip = loaded.clip.to(usable_device(device), dtype).eval().requires_grad_(False)
    loaded = LoadedClip(clip, loaded.tokenize, loaded.mean.to(device, dtype), loaded.deviation.to(device, dtype))
    return loaded, found.provenance("clip_proposals")


def _hub_id(model: str) -> str:
    name, _, tag = model.partition("/")
    return (open_clip.get_pretrained_cfg(name, tag).get("hf_hub") or model).rstrip("/")


def read_folder(folder: Path) -> LoadedClip:
    """The model of an open_clip folder, on the CPU in float32.

    Raises:
        UserError: a file is missing, or a part is not the one that the heads were trained on.
        ValueError, RuntimeError, KeyError: what a file holds does not fit.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} there; expected an open_clip folder with {CONFIG} and {WEIGHTS}")
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not (folder / PARTS).is_file():
        clip = open_clip.create_model(f"local-dir:{folder}", weights_only=True)
        return _loaded(clip, config, _tokenizer(folder, config) or open_clip.get_tokenizer(f"local-dir:{folder}"))
    parts = json.loads((folder / PARTS).read_text(encoding="utf-8"))
    state = _part_tensors(folder, parts) | {name: t.float() for name, t in load_file(folder / WEIGHTS).items()}
    return assemble(config, state, folder / parts["tokenizer"])


def assemble(config: Mapping[str, Any], state: Mapping[str, Tensor], tokenizer_folder: Path) -> LoadedClip:
    """A CLIP of these tensors; `config` as in `open_clip_config.json`."""
    clip = open_clip.CLIP(**config["model_cfg"])
    clip.load_state_dict(state)
    tokenize = _tokenizer(tokenizer_folder, config)
    if tokenize is None:
        raise UserError(f"{tokenizer_folder}: no tokenizer.json there")
    return _loaded(clip, config, tokenize)


def _loaded(clip: open_clip.CLIP, config: Mapping[str, Any], tokenize: Tokenize) -> LoadedClip:
    pixels = config["preprocess_cfg"]
    mean, deviation = (torch.tensor(pixels[name], dtype=torch.float32).view(3, 1, 1) for name in ("mean", "std"))
    return LoadedClip(clip, tokenize, mean, deviation)


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> Tokenize | None:
    """The CLIP tokenizer saved in a folder or its subfolder `tokenizer`, if any and if open_clip means no other one."""
    text = config["model_cfg"]["text_cfg"]
    found = next((f for f in (folder, folder / "tokenizer") if (f / "tokenizer.json").is_file()), None)
    if found is None or "hf_tokenizer_name" in text:
        return None
    hush_transformers()
    tokenizer = CLIPTokenizer.from_pretrained(found, local_files_only=True)
    length = text.get("context_length", 77)

    def tokenize(texts: Sequence[str]) -> Tensor:
        asked = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return tokenizer(list(texts), **asked).input_ids

    return tokenize


def _part_tensors(folder: Path, parts: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, read in (("image", image_tower), ("text", text_tower)):
        source = folder / parts[name]["folder"]
        found = read(source)
        if fingerprint(found) != parts[name]["fingerprint"]:
            raise UserError(
                f"{folder / PARTS}: the weights in {source} are not those that this model was trained on; "
                "train it again (task region_clip), or give the folder that belongs to it"
            )
        tensors |= found
    return tensors


def image_tower(folder: Path) -> dict[str, Tensor]:
    """The tensors `visual.…` of a folder: an open_clip folder or one that holds the image tower only."""
    return {name: tensor for name, tensor in _folder_tensors(folder).items() if name.startswith("visual.")}


def text_tower(folder: Path) -> dict[str, Tensor]:
    """The text tower of transformers' `CLIPTextModel` under open_clip's names: queries, keys, values in one matrix."""
    source = {name.removeprefix("text_model."): tensor for name, tensor in _folder_tensors(folder).items()}
    state = {new: source[old] for old, new in _TEXT_NAMES.items()}
    layers = sorted({int(name.split(".")[2]) for name in source if name.startswith("encoder.layers.")})
    for layer in layers:
        there, here = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for old, new in _LAYER_NAMES.items():
                state[f"{here}.{new}.{kind}"] = source[f"{there}.{old}.{kind}"]
            packed = [source[f"{there}.self_attn.{part}.{kind}"] for part in ("q_proj", "k_proj", "v_proj")]
            state[f"{here}.attn.in_proj_{kind}"] = torch.cat(packed)
    return state


def _folder_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no .safetensors file there")
    return {name: tensor.float() for file in files for name, tensor in load_file(file).items()}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of weights that is the same whether they are saved in fp32 or fp16."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].half().contiguous().numpy().tobytes())
    return digest.hexdigest()
