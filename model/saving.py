"""Saved subject models: only what was trained, over a base named beside it, or everything in one diffusers folder.

`parts="trained"` writes `subject_model.json` (manifest), `trained.safetensors` (base tensors that were trained),
`adapter/`, `image_encoder/` and the card `README.md`; it fits every base with the same frozen tensors, and on request
others of the same shape. `parts="all"` writes a folder whose stock parts the stock classes load.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers.models import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from model.composition import SubjectDiffusionModel
from model.image_encoder import SubjectImageEncoder
from model.subject_adapter import SubjectAdapter
from model.subject_adapter.attachment import detach

FORMAT_VERSION = 1
MANIFEST = "subject_model.json"
TRAINED = "trained.safetensors"
CARD = "README.md"


class SavedModelError(ValueError):
    """A folder that is no saved subject model, or does not fit its base, told in one line."""


def base_fingerprint(unet: nn.Module, text_encoder: nn.Module, without: Collection[str] = ()) -> str:
    """sha256 over names, shapes and values of a base's tensors, sorted by name.

    Values are hashed as fp16, so that a base is the same in fp32 and fp16. Attached parts do not count.

    Args:
        without: names (`unet.…`, `text_encoder.…`) left out: trained tensors, which a saved model brings itself.
    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_base_tensors(unet, text_encoder).items()):
        if name not in without:
            values = tensor.detach().to("cpu", torch.float16 if tensor.is_floating_point() else None)
            digest.update(f"{name} {tuple(values.shape)}\n".encode())
            digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _base_tensors(unet: nn.Module, text_encoder: nn.Module) -> dict[str, Tensor]:
    tensors = {f"unet.{name}": tensor for name, tensor in unet.state_dict().items()}
    return tensors | {f"text_encoder.{name}": tensor for name, tensor in text_encoder.state_dict().items()}


@torch.no_grad()
def save_subject_model(
    folder: Path,
    model: SubjectDiffusionModel,
    *,
    base: str,
    trained: Sequence[str],
    image_encoder: SubjectImageEncoder,
    card: str,
    parts: Literal["trained", "all"] = "trained",
    vae: Any = None,
    tokenizer: Any = None,
    scheduler: Any = None,
    dtype: torch.dtype | None = None,
    fingerprint: str | None = None,
) -> None:
    """Write a subject model.

    Args:
        folder: made when missing; files of an earlier save are replaced.
        model: not changed.
        base: name, folder or hub id of the base it was trained on.
        trained: names of the trained parameters, from `SubjectDiffusionModel.set_trainable`.
        image_encoder: the frozen encoder of references.
        card: text of the model card.
        parts: `trained` or `all`.
        vae, tokenizer, scheduler: needed for `all`.
        dtype: of the files; None keeps that of the weights.
        fingerprint: `base_fingerprint` of the base's frozen tensors, where the model holds them rounded; None: of those
            it holds.
    Raises:
        ValueError: `all` without one of its parts; a trained name that the model does not have.
    """
    folder = Path(folder)
    if parts not in ("trained", "all"):
        raise ValueError(f"parts {parts!r}: expected 'trained' or 'all'")
    if parts == "all":
        stock = {"vae": vae, "tokenizer": tokenizer, "scheduler": scheduler}
        absent = [name for name, value in stock.items() if value is None]
        if absent:
            raise ValueError(f"parts 'all': {', '.join(absent)} missing; it needs vae, tokenizer and scheduler")
        _save_all(folder, {"unet": model.unet, "text_encoder": model.text_encoder, **stock}, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    _save_part(model.adapter, folder / "adapter", dtype)
    _save_part(image_encoder, folder / "image_encoder", dtype)
    (folder / CARD).write_text(card, encoding="utf-8")
    if parts == "all":
        _write_index(folder)
    else:
        _save_trained(folder, model, base, trained, dtype, fingerprint)
    forget_origin(folder)


def forget_origin(folder: Path) -> None:
    """Remove the path of the machine that a model was loaded from; diffusers writes it into each configuration."""
    for file in folder.rglob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _save_trained(
    folder: Path,
    model: SubjectDiffusionModel,
    base: str,
    trained: Sequence[str],
    dtype: torch.dtype | None,
    fingerprint: str | None,
) -> None:
    tensors = _base_tensors(model.unet, model.text_encoder)
    names = [name for name in trained if not name.startswith("adapter.")]  # the adapter is saved whole
    unknown = sorted(set(names) - set(tensors))
    if unknown:
        raise ValueError(f"trained: the model has no tensor {unknown[0]}")
    # Cloned: tensors that share memory are refused by the format.
    chosen = {name: tensors[name].detach().to("cpu", dtype).contiguous().clone() for name in names}
    save_file(chosen, folder / TRAINED, metadata={"format": "pt"})
    manifest = {
        "format_version": FORMAT_VERSION,
        "base": base,
        "base_fingerprint": fingerprint or base_fingerprint(model.unet, model.text_encoder, without=set(names)),
        "trained": names,
    }
    # Written last: the sign of completion.
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _save_all(folder: Path, parts: dict[str, Any], dtype: torch.dtype | None) -> None:
    for name, part in parts.items():
        _save_part(part, folder / name, dtype if isinstance(part, nn.Module) else None)


def _save_part(part: Any, folder: Path, dtype: torch.dtype | None) -> None:
    if dtype is not None and part.dtype != dtype:
        part = copy.deepcopy(part)
        if isinstance(part, UNet2DConditionModel):
            detach(part)
        part = part.to(dtype)
    part.save_pretrained(folder)


def _write_index(folder: Path) -> None:
    """`model_index.json`: the parts of the pipeline by library and class, as diffusers writes it."""
    index: dict[str, Any] = {
        "_class_name": "SubjectDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "adapter": [SubjectAdapter.__module__, SubjectAdapter.__name__],
        "image_encoder": [SubjectImageEncoder.__module__, SubjectImageEncoder.__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class LoadedParts:
    """A `parts="trained"` folder in memory; `compose` puts it on its base."""

    folder: Path
    base: str  # name, folder or hub id of the base to load
    fingerprint: str | None  # of the base's frozen tensors; None: another base was asked for, only shapes must fit
    trained: dict[str, Tensor]  # base tensors that were trained, by name (`unet.…`, `text_encoder.…`)
    adapter: SubjectAdapter
    image_encoder: SubjectImageEncoder

    def compose(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> SubjectDiffusionModel:
        """The subject model: trained tensors are copied into the given base, the adapter is attached to its UNet.

        The fingerprint is that of fp32 or fp16 weights; load a base in one of these and cast afterwards.

        Raises:
            SavedModelError: see `copy_into`.
        """
        self.copy_into(unet, text_encoder)
        return SubjectDiffusionModel(unet, text_encoder, self.adapter.to(unet.device, unet.dtype))

    @torch.no_grad()
    def copy_into(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        """Put the trained tensors in the place of the base's.

        Raises:
            SavedModelError: a base of other shapes, or with other frozen tensors than the one it was trained on.
        """
        targets = _base_tensors(unet, text_encoder)
        for name, value in self.trained.items():
            found = tuple(targets[name].shape) if name in targets else "no such tensor"
            if found != tuple(value.shape):
                raise SavedModelError(
                    f"{self.folder / TRAINED}: {name} is {tuple(value.shape)}, base {self.base} has {found}; "
                    "give a base of the same architecture"
                )
        if self.fingerprint is not None:
            actual = base_fingerprint(unet, text_encoder, without=set(self.trained))
            if actual != self.fingerprint:
                raise SavedModelError(
                    f"{self.folder / MANIFEST}: trained on base {self.base} with fingerprint {self.fingerprint}, "
                    f"the base given has {actual}; give that base, or name this one explicitly to use it all the same"
                )
        for name, value in self.trained.items():
            targets[name].copy_(value)


def load_subject_model(folder: Path, *, base: str | None = None) -> LoadedParts:
    """Read a folder written with `parts="trained"`.

    Args:
        folder: local folder.
        base: another base than the one it was trained on (a fine-tune of it); then only shapes must fit.
    Raises:
        SavedModelError: not such a folder, or an incomplete one.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    try:
        trained = load_file(folder / TRAINED)
    except (OSError, SafetensorError) as error:
        raise SavedModelError(f"{folder / TRAINED}: cannot be read ({error}); save the model again") from error
    if set(trained) != set(manifest["trained"]):
        odd = sorted(set(trained) ^ set(manifest["trained"]))
        raise SavedModelError(f"{folder / TRAINED}: {odd[0]} does not agree with {MANIFEST}; save the model again")
    try:
        adapter = SubjectAdapter.from_pretrained(folder / "adapter", use_safetensors=True)
        image_encoder = SubjectImageEncoder.from_pretrained(folder / "image_encoder", use_safetensors=True)
    except OSError as error:
        raise SavedModelError(f"{folder}: adapter/ or image_encoder/ cannot be read ({error})") from error
    return LoadedParts(
        folder=folder,
        base=base or manifest["base"],
        fingerprint=None if base else manifest["base_fingerprint"],
        trained=trained,
        adapter=adapter,
        image_encoder=image_encoder,
    )


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SavedModelError(f"{path.parent}: no {MANIFEST}; expected a folder saved with parts='trained'") from error
    except (OSError, ValueError) as error:
        raise SavedModelError(f"{path}: cannot be read ({error}); save the model again") from error
    lacking = {"format_version", "base", "base_fingerprint", "trained"} - set(manifest)
    if lacking:
        raise SavedModelError(f"{path}: {sorted(lacking)[0]} is missing; save the model again")
    if manifest["format_version"] != FORMAT_VERSION:
        raise SavedModelError(
            f"{path}: format version {manifest['format_version']}, this program reads {FORMAT_VERSION}; "
            "use the version of the program that wrote it"
        )
    return manifest
