"""What an evaluation can be told: `subject-diffusion evaluate --config FILE [section.key=value …]`.

Every field is documented where it is declared; the resolved values are written beside the results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from data_pipeline.settings import Settings
from infer.cutout import CutoutMethod
from infer.drawing import Precision


class ProtocolSettings(Settings):
    """References x prompts x seeds (`protocols/`). Paths are relative to the working directory."""

    kind: Literal["toybox", "dreambench", "openimages", "folder"]
    folder: Path | None = None  # the data set or photos; the toybox needs none
    prompts: Path | None = None  # list of prompts by kind (YAML); null: the protocol's own
    subjects: tuple[str, ...] | int | None = None  # which by name, or how many of the first; null: all
    inputs: int = Field(1, ge=1)  # photos of a subject that a method gets to see, the first by name
    tuning_photos: int = Field(0, ge=0)  # of a subject, with their backgrounds, for methods that are tuned to it
    input_photos: dict[str, str] = {}  # subject: file name of the photo to see first, where it is not the first by name
    seeds: int = Field(1, ge=0)  # pictures of each subject and prompt; 0: no part "single"
    pairs: tuple[tuple[str, str], ...] | int = 0  # two-subject cases: which, or how many
    pair_seeds: int = Field(1, ge=1)  # pictures of each pair and prompt
    cutout: CutoutMethod = "auto"  # how photos lose their background


class ClassDriftSettings(Settings):
    """KID between a method's pictures of bare class words and another's: what it forgot of its classes."""

    images: int = Field(0, ge=0)  # of each method, spread over the protocol's nouns; 0: not measured
    against: str = "plain base"  # name of the method that it is compared with


class BackboneSettings(Settings):
    """Networks that measure, by hub id or folder; named beside every number."""

    clip: str = "openai/clip-vit-base-patch32"
    dino: str = "facebook/dino-vits16"
    detector: str = "IDEA-Research/grounding-dino-tiny"  # finds subjects for crops
    judges: Path | None = None  # folder with identity/ and segment/; null: the shipped ones


class SweepSettings(Settings):
    """One setting of a method at several values, drawn as a curve."""

    method: str  # name of one of `methods`
    key: str  # key of its settings
    values: tuple[Any, ...] = Field(min_length=2)
    groups: int = Field(8, ge=1)  # only the first so many groups of each part are drawn


class EvaluateSettings(Settings):
    """One comparison."""

    name: str
    output: Path
    protocol: ProtocolSettings
    methods: dict[str, dict[str, Any]] = Field(min_length=1)  # name: {kind: …, settings of `methods/`}
    metrics: tuple[str, ...] = ("clip", "dino", "diversity")  # `metrics/`
    backbones: BackboneSettings = BackboneSettings()
    crops: Literal["asked", "detected", "none"] = "detected"  # where scores of one subject look for it; detected: by a
    # detector, in the toybox by its segmenter; none: no such scores, in the toybox as asked
    class_drift: ClassDriftSettings = ClassDriftSettings()
    sweeps: dict[str, SweepSettings] = {}
    batch_size: int = Field(16, ge=1)  # pictures of a group drawn at once
    threads: int = Field(1, ge=1)  # of each process on a CPU; the last bits of a picture depend on it
    processes: int | None = Field(None, ge=1)  # side by side; null: as many as the cores hold, one a GPU
    device: str = "auto"  # auto: cuda if there is one, else cpu
    precision: Precision = "fp32"  # of the drawing models

    @model_validator(mode="after")
    def _names_are_known(self) -> EvaluateSettings:
        asked = {f"sweeps.{name}.method": sweep.method for name, sweep in self.sweeps.items()}
        if self.class_drift.images:
            asked["class_drift.against"] = self.class_drift.against
        for key, method in asked.items():
            if method not in self.methods:
                raise ValueError(f"{key}: no method {method!r}; expected one of {', '.join(self.methods)}")
        return self
