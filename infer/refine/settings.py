"""What a refinement can be told: `subject-diffusion refine --method NAME --images DIR … [section.key=value …]`.

A method declares its own keys beside its code (`options`); the resolved values are written into the file it makes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.settings import Settings
from infer.refine.methods import METHODS, load_method
from infer.refine.prompts import Kind
from train.settings import EngineSettings


class ConceptSettings(Settings):
    """One subject or style to learn; several are learnt jointly where the method can."""

    images: tuple[Path, ...] = Field(min_length=1)  # picture files, or folders of them; 3 to 5 pictures are best
    class_word: str = Field(min_length=1)  # what it is, "dog"; in the prompts it is compared with
    kind: Kind = "subject"


class EvaluationSettings(Settings):
    """The evaluator's report of the file, beside the bounds and the base without it."""

    metrics: tuple[str, ...] = Field(min_length=1)  # names of infer/evaluate/metrics
    prompts: Path | None = None  # list of prompts by kind (YAML), as the evaluator's; null: its own
    seeds: int = Field(1, gt=0)  # pictures of each prompt


class RefineReportSettings(Settings):
    """What is shown and kept on the way, in steps; and how the file is measured at the end."""

    log_every: int = Field(25, gt=0)
    checkpoint_every: int = Field(250, gt=0)
    preview_every: int = Field(0, ge=0)  # pictures of the prompts below; 0: after the last step only
    preview_prompts: tuple[str, ...] = ("a photo of {}", "{} on the beach", "{} in the snow", "{} next to a tree")
    preview_steps: int = Field(20, ge=1)  # denoising steps of a preview
    preview_guidance: float = Field(4.0, ge=0)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    evaluate: EvaluationSettings | None = None  # {metrics: [clip, dino]} …; null: no report


class RefineSettings(Settings):
    """One run of `refine`."""

    method: str  # one of infer/refine/methods
    concepts: dict[str, ConceptSettings] = {}  # by placeholder, the word that will stand for it: "z"
    pairs: Path | None = None  # in place of concepts: folder of pictures with texts, learnt without a word of their own
    model: str = "toybox"  # subject model (shipped name, folder, hub id), or a plain base
    plain: bool = False  # learn on the plain base of `model`, as published, instead of on its trained networks
    references: int = Field(0, ge=0)  # photos shown to the model besides, learning and drawing; 0: its subjects null
    output: Path  # the file, NAME.safetensors
    options: dict[str, Any] = {}  # the method's own settings
    regularisation: dict[str, Any] = {"kind": "none"}  # infer/refine/regularisation; DreamBooth, Custom Diffusion
    templates: Path | None = None  # texts with {} for the subject, one a line; null: the kind's own
    size: int | None = Field(None, ge=16)  # pixels, side of the pictures; null: what the model was trained at
    minutes: float | None = Field(None, gt=0)  # stop after so long, with what is learnt by then; null: all steps
    scale_learning_rate: bool = False  # times samples a step of all processes, as the published scripts do
    seed: int = 0
    workers: int = Field(0, ge=0)  # processes that vary pictures; 0: the training process does
    runs_dir: Path = Path("~/.cache/subject-diffusion/runs")  # checkpoints, to go on after an interruption
    engine: EngineSettings = EngineSettings(channels_last=False)
    report: RefineReportSettings = RefineReportSettings()
    device: str = "auto"

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in METHODS:
            raise ValueError(f"no such method; expected one of {', '.join(METHODS)}")
        return name

    @model_validator(mode="after")
    def _something_to_learn(self) -> RefineSettings:
        if bool(self.concepts) == (self.pairs is not None):
            raise ValueError(
                "concepts or pairs: give pictures of a subject (--images) or a folder of pictures with texts (--pairs)"
                + (", not both" if self.concepts else "")
            )
        if self.references and (self.plain or self.pairs is not None):
            what = "a plain base cannot look at pictures" if self.plain else "pairs show no subject"
            raise ValueError(f"references={self.references}: {what}; leave references out")
        if self.pairs is not None:
            able = [name for name in METHODS if load_method(name).pair_options is not None]
            if self.method not in able:
                raise ValueError(f"pairs: {self.method} learns a word, and pairs have none; expected {', '.join(able)}")
            if self.regularisation.get("kind", "none") != "none" or self.report.evaluate is not None:
                raise ValueError("pairs: show no subject, so leave regularisation and report.evaluate out")
        return self

    @field_validator("output")
    @classmethod
    def _safetensors(cls, path: Path) -> Path:
        if path.suffix != ".safetensors":
            raise ValueError("expected a file name that ends in .safetensors")
        return path
