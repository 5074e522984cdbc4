"""Parameter-efficient adapters: small bottlenecks beside a frozen UNet (Xiang et al., arXiv 2303.18181).

Which ones is told as in the published `adapter_config`, or by a YAML file that holds one (`adapter_config=FILE`). The
best pair of the paper is the default: read what cross-attention puts out, add ahead of the feed-forward. Defaults of
both its tasks: one subject with DreamBooth's prompts, and pairs of pictures and texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.settings import Settings, settings_of
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
from model.efficient_adapters import AdapterDesign, AdapterError, EfficientAdapters, attach, load_folder, save_folder

PREFIX = "adapters."  # of their tensors in the file
ACTIVATIONS = {"default": "relu", "sig": "sigmoid", "ident": "identity"}  # as published -> as they are called here
SECTION = "adapter_config"

Method = Literal["default", "relu", "sig", "silu", "ident", "sigmoid", "identity"]
# The published presets of the two tasks; 256 gives the 6.4 million parameters of the second at SD 1.5's shape.
PRESETS: dict[str, dict[str, Any]] = {
    "subject": {},
    "pairs": {
        "steps": 60_000,
        "learning_rate": 1e-5,
        SECTION: {"transformer_adp_config": [{"din": "attn2o", "dout": "ffni", "mid_dim": 256}]},
    },
}


class AdapterKeys(Settings):
    """One adapter in each transformer block, in the published words."""

    type: Literal["inout"] = "inout"
    din: str  # where it reads: attn1i attn1o attn2i attn2o attn2c ffni ffno transo
    dout: str  # where it adds: attn1i attn2i attn2c ffni transo
    method: Method = "default"  # activation; default: relu
    mid_dim: int = 60  # width of the bottleneck
    scale: float = 1.0

    def design(self) -> AdapterDesign:
        """Raises AdapterError."""
        return AdapterDesign(self.din, self.dout, self.mid_dim, ACTIVATIONS.get(self.method, self.method), self.scale)


class ResidualKeys(AdapterKeys):
    """One adapter in each ResBlock."""

    din: str = "resi"  # or reso
    dout: str = "reso"  # or resi
    mid_dim: int = 7


class AdapterConfig(Settings):
    """`adapter_config` as published; each section holds one adapter or a list of them."""

    transformer_adp_config: tuple[AdapterKeys, ...] = ()
    resblock_adp_config: tuple[ResidualKeys, ...] = ()

    @field_validator("transformer_adp_config", "resblock_adp_config", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value or []

    @model_validator(mode="after")
    def _possible(self) -> AdapterConfig:
        self.designs()
        return self

    def designs(self) -> list[AdapterDesign]:
        """The adapters.

        Raises:
            UserError: an input and an output that do not go together, or none.
        """
        try:
            designs = [keys.design() for keys in (*self.transformer_adp_config, *self.resblock_adp_config)]
        except AdapterError as error:
            raise UserError(f"{SECTION}: {error}") from error
        in_transformers = designs[: len(self.transformer_adp_config)]
        if any(one.in_residual_block for one in in_transformers):
            raise UserError(f"{SECTION}: resi and reso belong under resblock_adp_config")
        if not all(one.in_residual_block for one in designs[len(in_transformers) :]):
            raise UserError(f"{SECTION}: under resblock_adp_config din and dout are resi or reso")
        if not designs:
            raise UserError(f"{SECTION}: is empty; give transformer_adp_config, resblock_adp_config or both")
        return designs


class AdapterSettings(AdditionSettings):
    """`options` of adapter."""

    preset: Literal["subject", "pairs"] = "subject"  # published values of the two tasks, where not given themselves
    steps: int = Field(2500, gt=0)
    batch_size: int = Field(1, gt=0)
    learning_rate: float = Field(1e-4, gt=0)
    adapter_config: AdapterConfig = AdapterConfig(transformer_adp_config=(AdapterKeys(din="attn2o", dout="ffni"),))

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return PRESETS.get(str(values.get("preset")), {}) | values if isinstance(values, dict) else values

    @field_validator("adapter_config", mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        return read_adapter_config(Path(value)) if isinstance(value, str | Path) else value


def read_adapter_config(file: Path) -> AdapterConfig:
    """The adapters of a YAML file: a whole published config, its `adapter_config:`, or what stands below it.

    Raises:
        UserError: it cannot be read, or says nothing of adapters.
    """
    try:
        content = yaml.safe_load(file.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{SECTION} {file}: cannot be read ({error.strerror}); give an existing YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{SECTION} {file}: not valid YAML ({' '.join(str(error).split())[:160]})") from error
    found = _section(content)
    if found is None:
        raise UserError(f"{SECTION} {file}: holds no {SECTION}; expected transformer_adp_config or resblock_adp_config")
    return settings_of(AdapterConfig, found, str(file))


def _section(content: Any) -> dict[str, Any] | None:
    """The section wherever it stands; published, five levels down."""
    if not isinstance(content, dict):
        return None
    if isinstance(content.get(SECTION), dict):
        return content[SECTION]
    if set(content) & set(AdapterConfig.model_fields):
        return content
    return next((found for value in content.values() if (found := _section(value)) is not None), None)


class AdapterModule(AdditionModule):
    """See `RefineModule`; the base's pipeline draws with the adapters from now on."""

    def __init__(self, base: RefineBase, known: IdentifiedWords, settings: AdapterSettings) -> None:
        super().__init__(base, known, settings)
        self.adapters = EfficientAdapters(base.pipeline.unet, settings.adapter_config.designs())
        self.adapters.to(base.pipeline.unet.device)
        attach(base.pipeline.unet, [self.adapters])

    def tensors(self) -> dict[str, Tensor]:
        own = {f"{PREFIX}{name}": value for name, value in self.adapters.tensors().items()}
        return super().tensors() | own


class AdapterMethod:
    """See `RefineMethod`."""

    name = "adapter"
    settings: type[MethodSettings] = AdapterSettings
    pair_options: dict[str, Any] | None = {"preset": "pairs"}
    has_strength = True

    def thing(self, concept: Concept, settings: Any) -> str:
        return identified_thing(concept)

    def joins(self, settings: Any) -> bool:
        return True

    def build(self, base: RefineBase, concepts: Sequence[Concept], settings: AdapterSettings) -> AdapterModule:
        """No concepts: the task of pairs."""
        try:
            return AdapterModule(base, identified_words(base, concepts, settings), settings)
        except AdapterError as error:
            raise UserError(str(error)) from error

    def install(self, pipeline: SubjectDiffusionPipeline, refinements: Sequence[Refinement]) -> None:
        """All files side by side, each at its strength; those that were installed before are taken out."""
        sets = [refined_adapters(pipeline, refinement) for refinement in refinements]
        for adapters, refinement in zip(sets, refinements, strict=True):
            adapters.strength = refinement.strength
            adapters.to(pipeline.unet.device, pipeline.unet.dtype).requires_grad_(False)
        attach(pipeline.unet, sets)


METHOD = AdapterMethod()


def refined_adapters(pipeline: SubjectDiffusionPipeline, refinement: Refinement) -> EfficientAdapters:
    """The adapters of a file, for the UNet of a pipeline; not attached.

    Raises:
        UserError: the file holds none, or they do not fit.
    """
    told = refinement.settings.get("options", {}).get(SECTION)
    if not isinstance(told, dict):
        raise UserError(f"{refinement.label}: does not say which adapters it holds; it is damaged")
    own = {name.removeprefix(PREFIX): value for name, value in refinement.tensors.items() if name.startswith(PREFIX)}
    try:
        adapters = EfficientAdapters(pipeline.unet, settings_of(AdapterConfig, told, refinement.label).designs())
        adapters.load_tensors(own)
    except AdapterError as error:
        raise UserError(f"{refinement.label}: {error}") from error
    return adapters


def export_adapters(pipeline: SubjectDiffusionPipeline, refinement: Refinement, folder: Path) -> list[Path]:
    """Write the adapters of a file into a folder, one file each, as the published code does.

    Raises:
        UserError: they do not fit the pipeline, or the folder cannot be written.
    """
    adapters = refined_adapters(pipeline, refinement)
    try:
        return save_folder(adapters, folder)
    except AdapterError as error:
        raise UserError(str(error)) from error


def install_folder(pipeline: SubjectDiffusionPipeline, folder: Path) -> None:
    """Draw with the adapters of such a folder.

    Raises:
        UserError: none there, or they do not fit.
    """
    try:
        adapters = load_folder(pipeline.unet, folder)
    except AdapterError as error:
        raise UserError(str(error)) from error
    adapters.to(pipeline.unet.device, pipeline.unet.dtype).requires_grad_(False)
    attach(pipeline.unet, [adapters])
