"""What a training run can be told, section by section: `subject-diffusion train --config FILE [section.key=value …]`.

Every field is documented where it is declared; the resolved values are written beside the run's outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from data_pipeline.settings import Settings, load_settings

TaskName = Literal["vae", "clip", "base", "subject", "judge_identity", "judge_segment", "region_clip"]
StrategyName = Literal["ddp", "zero1", "zero2", "zero3", "zero2_offload"]
Decay = Literal["constant", "cosine", "linear"]


class ToyboxSource(Settings):
    """Toybox scenes, rendered on the fly; scene i of a seed is always the same one."""

    weight: float | None = Field(None, ge=0)  # share among the sources; null: 1, or 0 where shards are named
    split: Literal["train", "val"] = "train"
    min_subjects: int = Field(0, ge=0, le=4)
    max_subjects: int = Field(4, ge=0, le=8)
    references: tuple[int, int] = (1, 3)  # fewest and most references a subject
    procedural_share: float = Field(0.4, ge=0, le=1)  # share of subjects that are procedural or recoloured
    group_share: float = Field(0.6, ge=0, le=1)  # share of subjects that captions call by a group word (animal, thing)
    colour_share: float = Field(0.25, ge=0, le=1)  # share of captions that name a colour


class EntityFilters(Settings):
    """Which entities of a shard's sample are trained on, after the crop; Subject-Diffusion's published values.

    A sample keeps those that pass; one without any is trained on as plain text and picture.
    """

    min_area: float = Field(0.08, ge=0, le=1)  # of the box, as a share of the picture
    max_area: float = Field(0.7, gt=0, le=1)
    min_aspect: float = Field(0.3, gt=0)  # width of the box over its height
    max_aspect: float = Field(3.0, gt=0)
    min_score: float = Field(0.3, ge=0, le=1)  # of the detector
    min_mask_share: float = Field(0.6, ge=0, le=1)  # of the box that the mask covers
    max_overlap: float = Field(0.8, ge=0, le=1)  # intersection over the smaller box, with an entity of higher score
    max_white: float = Field(0.1, ge=0, le=1)  # share of the picture that is white (over 0.9); above: no entities


class ShardsSource(Settings):
    """Shards of the dataset builder."""

    folder: str | None = None  # where they lie: a folder or an fsspec URL (s3://…)
    pipe: str | None = None  # instead: a command that writes {file} to its output, "ssh store cat /d/{file}"
    names: str | None = None  # shards behind `pipe`, with braces: "00000..00999" in {} counts
    weight: float = Field(1.0, ge=0)  # share among the sources
    filters: EntityFilters = EntityFilters()
    nouns: Path | None = None  # file of nouns, one a line; only entities with one of them are trained on


class ReferenceSettings(Settings):
    """Where a subject's reference comes from, and what is done to it."""

    source: Literal["same_image", "other_image"] = "other_image"  # cut out of the target, or another picture of it
    most: int = Field(3, ge=1, le=8)  # references a subject; of more, this many are drawn
    background: float = Field(0.5, ge=0, le=1)  # chance of a random background instead of mid-grey
    backgrounds: Path | None = None  # folder of pictures to draw backgrounds from; null: other samples of the shard
    flip: float = Field(0.0, ge=0, le=1)  # chance of a mirrored reference
    rotation_degrees: float = Field(0.0, ge=0, le=180)  # at most, to either side
    perspective: float = Field(0.0, ge=0, le=1)  # chance of a random perspective of distortion 0.5


class DataSettings(Settings):
    """Where the samples come from. Sample n is a pure function of n and these settings: a position is one number."""

    toybox: ToyboxSource = ToyboxSource()
    shards: dict[str, ShardsSource] = {}  # by a name of your choice; tasks base and subject
    references: ReferenceSettings = ReferenceSettings()
    seed: int = 0
    size: int = Field(64, ge=16)  # pixels, width and height
    crop: Literal["random", "middle"] = "random"  # shards: the square, among those that show the most of the boxes
    max_subjects: int = Field(4, ge=0, le=8)  # a sample; the largest stay
    order: Literal["epochs", "resampled"] = "epochs"  # each shard once an epoch, or drawn with replacement
    shuffle_shards: int = Field(2, ge=1)  # shards whose samples are shuffled together, before anything is decoded
    scratch: Path = Path("~/.cache/subject-diffusion/shards")  # where shards from elsewhere wait, some at a time
    distinct_scenes: int = Field(0, ge=0)  # tasks vae, clip, judges: scenes kept and seen again; 0: every scene is new
    workers: int = Field(1, ge=0)  # processes that read, decode and render; 0: the training process does
    cache_scenes: int = Field(0, ge=0)  # toybox: scenes in one pool of cached latents and features; 0: nothing cached
    cache_passes: int = Field(4, ge=1)  # passes over a pool before the next one is rendered
    cache: Path | None = None  # shards: folder that `train cache` wrote; null: the frozen models run at every step


class OptimizerSettings(Settings):
    """AdamW with linear warm-up, then constant or decaying."""

    kind: Literal["adamw", "adamw8bit"] = "adamw"  # 8 bit: bitsandbytes, on a GPU
    learning_rate: float = Field(1e-3, gt=0)
    groups: dict[str, float] = {}  # pattern (full match on a parameter's name) -> factor on the learning rate
    weight_decay: float = Field(0.0, ge=0)
    beta1: float = Field(0.9, gt=0, lt=1)
    beta2: float = Field(0.99, gt=0, lt=1)
    epsilon: float = Field(1e-8, gt=0)
    warmup_steps: int = Field(100, ge=0)
    decay: Decay = "cosine"
    decay_to: float = Field(0.0, ge=0, le=1)  # share of the learning rate that a decay ends at
    max_grad_norm: float = Field(1.0, gt=0)
    max_skipped: int = Field(10, ge=1)  # steps on end whose loss or gradients are not finite, before the run stops


class EmaSettings(Settings):
    """Running average of the trained parameters, float32: what is validated and exported."""

    decay: float = Field(0.999, ge=0, lt=1)
    start: int = Field(0, ge=0)  # step from which on it runs
    every: int = Field(1, ge=1)  # steps between updates
    offload: bool = False  # keep it in main memory


class EngineSettings(Settings):
    """How the arithmetic is done and spread over devices: speed, memory, and the last bits of results."""

    strategy: StrategyName = "ddp"
    precision: Literal["no", "bf16", "fp16"] = "no"
    checkpoint_activations: tuple[Literal["unet", "text_encoder"], ...] = ()  # computed again, not kept; base, subject
    compile: bool = False  # torch.compile of the UNet's repeated blocks; tasks base and subject
    channels_last: bool = True
    tf32: bool = True  # float32 matrix products on tensor cores


class ReportSettings(Settings):
    """What is written down, and how often, in steps."""

    log_every: int = Field(50, gt=0)
    checkpoint_every: int = Field(250, gt=0)
    checkpoints_kept: int = Field(2, ge=1)
    validate_every: int = Field(1000, gt=0)  # also after the last step
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    project: str = "subject-diffusion"  # for wandb
    profile_at: int | None = None  # step at which a window of torch.profiler opens, after one step of warm-up
    profile_steps: int = Field(3, ge=1)


class DiffusionSettings(Settings):
    """Tasks base and subject."""

    snr_gamma: float | None = 5.0  # min-SNR-gamma (arXiv 2303.09556); null: every timestep weighs the same
    mask_weight: float = Field(1.0, gt=0)  # of the denoising error inside entity masks; 1 outside
    attention_loss_weight: float = Field(0.01, ge=0)  # attention-map loss, task subject
    attention_loss_kind: Literal["balanced", "absolute"] = "balanced"
    supervise: tuple[Literal["placeholder", "noun", "caption"], ...] = ("placeholder", "noun")
    drop_all: float = Field(0.05, ge=0, le=1)
    drop_text: float = Field(0.05, ge=0, le=1)
    drop_location: float = Field(0.05, ge=0, le=1)
    drop_subjects: float = Field(0.05, ge=0, le=1)
    timestep_bands: int = Field(4, ge=1)  # the loss is also logged by so many equal ranges of timesteps


class ModelOverrides(Settings):
    """Changes to the model file, for ablations."""

    adapter: dict[str, Any] = {}  # keyword arguments of SubjectAdapter.from_unet, over those of the file
    trained: tuple[str, ...] | None = None  # instead of the file's patterns


class RunSettings(Settings):
    """What the loop itself has to know of a run, whatever is trained."""

    name: str  # the run's folder below runs_dir, e.g. toybox/vae
    runs_dir: Path = Path("~/.cache/subject-diffusion/runs")
    seed: int = 0
    steps: int = Field(gt=0)
    minutes: float | None = Field(None, gt=0)  # stop after so long, with a checkpoint; null: after the last step
    batch_size: int = Field(32, gt=0)  # samples a process and forward pass
    accumulate: int = Field(1, gt=0)  # forward passes an optimiser step
    optimizer: OptimizerSettings = OptimizerSettings()
    ema: EmaSettings = EmaSettings()
    engine: EngineSettings = EngineSettings()
    report: ReportSettings = ReportSettings()

    @property
    def folder(self) -> Path:
        return self.runs_dir.expanduser() / self.name


class TrainSettings(RunSettings):
    """One training run of one model."""

    task: TaskName
    model: Path = Path("configs/model/toybox.yaml")  # sizes of all models
    override: ModelOverrides = ModelOverrides()  # of the model file
    inputs: dict[str, str] = {}  # models this one stands on: {vae: toybox/vae}, a run's name, a folder or a hub id
    data: DataSettings = DataSettings()
    diffusion: DiffusionSettings = DiffusionSettings()
    options: dict[str, Any] = {}  # the task's own settings, checked by the task


class ModelSettings(Settings):
    """The networks of one size: arguments of the stock classes, and which parameters the subject model trains."""

    base: str  # name, folder or hub id of the plain text-to-image model
    image_encoder: dict[str, str] | None = None  # open_clip name and pretrained tag; null: `architecture.clip`
    architecture: dict[str, dict[str, Any]] = {}  # keyword arguments by part: vae, clip, text_encoder, unet, scheduler
    adapter: dict[str, Any] = {}  # keyword arguments of SubjectAdapter.from_unet
    trained: tuple[str, ...] = ()  # name patterns (full match) on unet.…, text_encoder.…, adapter.…


REPOSITORY = Path(__file__).resolve().parent.parent


def load_model_settings(path: Path, override: ModelOverrides | None = None) -> ModelSettings:
    """Read a model file, relative to the working directory or else to this repository."""
    model = load_settings(ModelSettings, [path if path.exists() else REPOSITORY / path], [])
    if override is None:
        return model
    trained = model.trained if override.trained is None else override.trained
    return model.model_copy(update={"adapter": model.adapter | override.adapter, "trained": trained})
