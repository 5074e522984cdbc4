"""What a training run can be told, section by section: `subject-diffusion train --config FILE [section.key=value …]`.

Every field is documented where it is declared; the resolved values are written beside the run's outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data_pipeline.settings import Settings, load_settings

TaskName = Literal["vae", "clip", "base", "subject", "judge_identity", "judge_segment", "region_clip"]


class DataSettings(Settings):
    """Toybox scenes, rendered on the fly, or shards; sample i of a seed is always the same scene."""

    shards: str | None = None  # folder of the dataset builder's shards, tasks base and subject; null: toybox scenes
    split: Literal["train", "val"] = "train"
    seed: int = 0
    size: int = Field(64, ge=16)  # pixels, width and height
    min_subjects: int = Field(0, ge=0, le=4)
    max_subjects: int = Field(4, ge=0, le=8)
    references: tuple[int, int] = (1, 3)  # fewest and most references a subject
    procedural_share: float = Field(0.4, ge=0, le=1)  # share of subjects that are procedural or recoloured
    distinct_scenes: int = Field(0, ge=0)  # tasks vae, clip, judges: scenes kept and seen again; 0: every scene is new
    workers: int = Field(1, ge=0)  # rendering processes; 0 renders in the training process
    cache_scenes: int = Field(0, ge=0)  # scenes in one pool of cached latents and features (tasks base and subject)
    cache_passes: int = Field(4, ge=1)  # passes over a pool before the next one is rendered


class OptimizerSettings(Settings):
    """AdamW with linear warm-up, then constant or decaying to zero."""

    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    beta2: float = Field(0.99, gt=0, lt=1)
    warmup_steps: int = Field(100, ge=0)
    decay: Literal["constant", "cosine", "linear"] = "cosine"
    max_grad_norm: float = Field(1.0, gt=0)


class DiffusionSettings(Settings):
    """Tasks base and subject."""

    snr_gamma: float | None = 5.0  # min-SNR-gamma (arXiv 2303.09556); null: every timestep weighs the same
    mask_weight: float = Field(1.0, gt=0)  # of the denoising error inside entity masks; 1 outside; task subject
    attention_loss_weight: float = Field(0.01, ge=0)  # attention-map loss, task subject
    attention_loss_kind: Literal["balanced", "absolute"] = "balanced"
    supervise: tuple[Literal["placeholder", "noun", "caption"], ...] = ("placeholder", "noun")
    drop_all: float = Field(0.05, ge=0, le=1)
    drop_text: float = Field(0.05, ge=0, le=1)
    drop_location: float = Field(0.05, ge=0, le=1)
    drop_subjects: float = Field(0.05, ge=0, le=1)
    reference: Literal["same_image", "other_image"] = "other_image"  # where the reference of a subject comes from


class TrainSettings(Settings):
    """One training run of one model."""

    task: TaskName
    name: str  # the run's folder below runs_dir, e.g. toybox/vae
    runs_dir: Path = Path("~/.cache/subject-diffusion/runs")
    model: Path = Path("configs/model/toybox.yaml")  # sizes of all models
    inputs: dict[str, str] = {}  # models this one stands on: {vae: toybox/vae}, a run's name or an exported folder
    seed: int = 0
    steps: int = Field(gt=0)
    batch_size: int = Field(32, gt=0)  # samples a process and step
    accumulate: int = Field(1, gt=0)  # forward passes an optimiser step
    precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = True
    ema_decay: float = Field(0.999, ge=0, lt=1)
    log_every: int = Field(50, gt=0)  # steps
    checkpoint_every: int = Field(250, gt=0)  # steps
    checkpoints_kept: int = Field(2, ge=1)
    validate_every: int = Field(1000, gt=0)  # steps; also after the last one
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    diffusion: DiffusionSettings = DiffusionSettings()
    options: dict[str, Any] = {}  # the task's own settings, checked by the task

    @property
    def folder(self) -> Path:
        return self.runs_dir.expanduser() / self.name


class ModelSettings(Settings):
    """The networks of one size: arguments of the stock classes, and which parameters the subject model trains."""

    base: str  # name, folder or hub id of the plain text-to-image model
    image_encoder: dict[str, str] | None = None  # open_clip name and pretrained tag; null: `architecture.clip`
    architecture: dict[str, dict[str, Any]] = {}  # keyword arguments by part: vae, clip, text_encoder, unet, scheduler
    adapter: dict[str, Any] = {}  # keyword arguments of SubjectAdapter.from_unet
    trained: tuple[str, ...] = ()  # name patterns (full match) on unet.…, text_encoder.…, adapter.…


REPOSITORY = Path(__file__).resolve().parent.parent


def load_model_settings(path: Path) -> ModelSettings:
    """Read a model file, relative to the working directory or else to this repository."""
    return load_settings(ModelSettings, [path if path.exists() else REPOSITORY / path], [])
