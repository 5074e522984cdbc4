"""LoRA: low-rank changes of the UNet's attention, W + s B A (Hu et al., arXiv 2106.09685), the everyday yardstick.

peft does the work, on self- and cross-attention alone. The file holds diffusers' own layout, with the factor s already
in B, so that `export_lora` needs no conversion and `load_lora_weights` of any pipeline reads what it wrote. Defaults:
diffusers' DreamBooth-LoRA example.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import set_weights_and_activate_adapters
from peft import LoraConfig, get_peft_model_state_dict
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from data_pipeline.errors import UserError
from infer.pipeline import SubjectDiffusionPipeline
from infer.refine.method import Concept, MethodSettings, RefineBase
from infer.refine.refinement import Refinement
from infer.refine.weight_additions import (
    AdditionModule,
    AdditionSettings,
    IdentifiedWords,
    identified_thing,
    identified_words,
)

# Subject fusers have projections of the same names; only attention is meant.
UNET_LAYERS = r".*\.attn[12]\.to_(q|k|v|out\.0)"
TEXT_LAYERS = r".*\.self_attn\.(q|k|v|out)_proj"
TRAINED = "trained"  # peft's name of what is being learnt
INSTALLED = "refined"  # and of installed ones: refined0, refined1 …
PARTS = ("unet", "text_encoder")


class LoraSettings(AdditionSettings):
    """`options` of lora."""

    steps: int = Field(500, gt=0)
    batch_size: int = Field(1, gt=0)
    learning_rate: float = Field(1e-4, gt=0)
    rank: int = Field(4, gt=0)
    alpha: int | None = Field(None, gt=0)  # s = alpha / rank; null: the rank, so that s is 1
    dropout: float = Field(0.0, ge=0, lt=1)
    text_encoder: bool = False  # its self-attention too


class LoraModule(AdditionModule):
    """See `RefineModule`; the base's pipeline draws with it from now on."""

    def __init__(self, base: RefineBase, known: IdentifiedWords, settings: LoraSettings) -> None:
        super().__init__(base, known, settings)
        alpha = settings.rank if settings.alpha is None else settings.alpha
        self.factor = alpha / settings.rank
        self.lora = nn.ParameterDict()
        for part in PARTS if settings.text_encoder else PARTS[:1]:
            network = getattr(base.pipeline, part)
            _remove(network, [TRAINED])
            network.add_adapter(
                LoraConfig(
                    r=settings.rank,
                    lora_alpha=alpha,
                    lora_dropout=settings.dropout,
                    init_lora_weights="gaussian",  # A; B is 0, so that it starts as the base
                    target_modules=UNET_LAYERS if part == "unet" else TEXT_LAYERS,
                ),
                adapter_name=TRAINED,
            )
            for name, parameter in network.named_parameters():
                if parameter.requires_grad and f".{TRAINED}." in name:
                    parameter.data = parameter.data.float()
                    self.lora[f"{part}/{name}".replace(".", "/")] = parameter  # a name can hold no dot

    def train(self, mode: bool = True) -> LoraModule:
        """Dropout stands in the base's layers."""
        super().train(mode)
        for part in PARTS:
            for module in getattr(self.base.pipeline, part).modules():
                if isinstance(module, nn.ModuleDict) and TRAINED in module:
                    module.train(mode)
        return self

    def tensors(self) -> dict[str, Tensor]:
        own: dict[str, Tensor] = {}
        for part in PARTS:
            network = getattr(self.base.pipeline, part)
            if TRAINED in getattr(network, "peft_config", {}):
                state = get_peft_model_state_dict(network, adapter_name=TRAINED)
                own |= {f"{part}.{_public(part, name)}": self._scaled(name, value) for name, value in state.items()}
        return super().tensors() | own

    def _scaled(self, name: str, value: Tensor) -> Tensor:
        return value.detach().cpu().clone() * (self.factor if ".lora_B." in name else 1.0)


class LoraMethod:
    """See `RefineMethod`."""

    name = "lora"
    settings: type[MethodSettings] = LoraSettings
    pair_options: dict[str, Any] | None = {}
    has_strength = True

    def thing(self, concept: Concept, settings: Any) -> str:
        return identified_thing(concept)

    def joins(self, settings: Any) -> bool:
        return True

    def build(self, base: RefineBase, concepts: Sequence[Concept], settings: LoraSettings) -> LoraModule:
        """No concepts: fine-tuning on pairs."""
        return LoraModule(base, identified_words(base, concepts, settings), settings)

    def install(self, pipeline: SubjectDiffusionPipeline, refinements: Sequence[Refinement]) -> None:
        """All files at once, W + sum of strength · B A; those that were installed before are taken out."""
        names = [f"{INSTALLED}{index}" for index in range(len(refinements))]
        for part in PARTS:
            network = getattr(pipeline, part)
            _remove(network, [name for name in getattr(network, "peft_config", {}) if name.startswith(INSTALLED)])
            chosen = []
            for name, refinement in zip(names, refinements, strict=True):
                own = _of_part(lora_tensors(refinement), part)
                if own:
                    _load(pipeline, part, own, name, refinement.label)
                    chosen.append((name, refinement.strength))
            if chosen:
                set_weights_and_activate_adapters(network, [name for name, _ in chosen], [w for _, w in chosen])
                network.requires_grad_(False)


METHOD = LoraMethod()


def lora_tensors(refinement: Refinement) -> dict[str, Tensor]:
    """What diffusers would read of a file.

    Raises:
        UserError: the file holds no LoRA.
    """
    own = {name: value for name, value in refinement.tensors.items() if ".lora_" in name}
    if not own:
        raise UserError(f"{refinement.label}: holds no LoRA; it was learnt with {refinement.method}, or is damaged")
    return own


def export_lora(refinement: Refinement, path: Path) -> None:
    """Write a file for `load_lora_weights` of diffusers; in its prompts the identifier goes where the placeholder went.

    Args:
        path: NAME.safetensors.
    Raises:
        UserError: the file holds no LoRA, or `path` cannot be written.
    """
    tensors = {name: value.contiguous() for name, value in lora_tensors(refinement).items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: cannot be written ({reason}); give another file") from error


def _load(pipeline: SubjectDiffusionPipeline, part: str, tensors: dict[str, Tensor], name: str, label: str) -> None:
    """Put the LoRA of one part (names with its prefix) into a pipeline under a name of peft's.

    Raises:
        UserError: it was made for another base.
    """
    network = getattr(pipeline, part)
    device, dtype = network.device, network.dtype
    tensors = {key: value.to(device, dtype) for key, value in tensors.items()}
    _check_shapes(network, part, tensors, label)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several at once are meant
        if part == "unet":
            network.load_lora_adapter(tensors, prefix=part, adapter_name=name)
        else:
            StableDiffusionLoraLoaderMixin.load_lora_into_text_encoder(
                tensors, network_alphas=None, text_encoder=network, prefix=part, adapter_name=name
            )


def _check_shapes(network: nn.Module, part: str, tensors: dict[str, Tensor], label: str) -> None:
    """diffusers only warns of layers that a base lacks."""
    modules = dict(network.named_modules())
    for key, value in tensors.items():
        layer, _, kind = key.removeprefix(f"{part}.").removesuffix(".weight").rpartition(".")
        found = modules.get(layer.removeprefix("text_model."))
        linear = getattr(found, "base_layer", found)
        if not isinstance(linear, nn.Linear):
            raise UserError(f"{label}: made for another base; this one has no layer {layer}")
        width = linear.in_features if kind == "lora_A" else linear.out_features
        if value.shape[1 if kind == "lora_A" else 0] != width:
            raise UserError(f"{label}: made for another base; {layer} is {width} wide here, and it has {value.shape}")


def _of_part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if name.startswith(f"{part}.")}


def _public(part: str, name: str) -> str:
    """Files name the text encoder's layers as all of its versions but transformers' latest do."""
    return name if part == "unet" or name.startswith("text_model.") else f"text_model.{name}"


def _remove(network: Any, names: Sequence[str]) -> None:
    for name in names:
        if name in getattr(network, "peft_config", {}):
            if hasattr(network, "delete_adapters"):
                network.delete_adapters(name)
            else:
                network.delete_adapter(name)
