"""What a build can be told: `subject-diffusion data --config FILE [section.key=value …]`.

Every plug-in declares its own keys beside its code; this file only lists the plug-ins. Sections `output` and `engine`
say where and how the work is done; all others decide what the shards hold and may not change on a half-built output.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from data_pipeline.images import ImageSettings
from data_pipeline.rules import RuleSettings
from data_pipeline.settings import Settings
from data_pipeline.sources.folder import FolderSettings
from data_pipeline.sources.laion import LaionSettings
from data_pipeline.sources.openimages import OpenImagesSettings
from data_pipeline.sources.toybox_scenes import ToyboxSettings
from data_pipeline.sources.webdataset_shards import WebDatasetSettings
from data_pipeline.stages.caption.alt_text import AltTextSettings
from data_pipeline.stages.caption.blip import BlipSettings
from data_pipeline.stages.caption.blip2 import Blip2Settings
from data_pipeline.stages.checks.faces import FacesSettings
from data_pipeline.stages.checks.nsfw import NsfwSettings
from data_pipeline.stages.detect.clip_proposals import ClipProposalsSettings
from data_pipeline.stages.detect.grounding_dino import GroundingDinoSettings
from data_pipeline.stages.detect.grounding_dino_py import GroundingDinoPySettings
from data_pipeline.stages.nouns.spacy_chunks import SpacySettings
from data_pipeline.stages.segment.grabcut import GrabCutSettings
from data_pipeline.stages.segment.sam import SamSettings
from data_pipeline.stages.segment.segment_anything_py import SegmentAnythingSettings

SourceSettings = Annotated[
    LaionSettings | WebDatasetSettings | FolderSettings | OpenImagesSettings | ToyboxSettings,
    Field(discriminator="kind"),
]
CaptionSettings = Annotated[Blip2Settings | BlipSettings | AltTextSettings, Field(discriminator="backend")]
DetectSettings = Annotated[
    GroundingDinoSettings | GroundingDinoPySettings | ClipProposalsSettings, Field(discriminator="backend")
]
SegmentSettings = Annotated[SamSettings | SegmentAnythingSettings | GrabCutSettings, Field(discriminator="backend")]
CheckSettings = Annotated[NsfwSettings | FacesSettings, Field(discriminator="check")]


class StageSettings(Settings):
    """Which backend does each stage."""

    caption: CaptionSettings = Blip2Settings()
    nouns: SpacySettings | None = SpacySettings()  # null, with detect null: the source itself knows its entities
    detect: DetectSettings | None = GroundingDinoSettings()
    segment: SegmentSettings = SamSettings()

    @model_validator(mode="after")
    def _together(self) -> StageSettings:
        if (self.nouns is None) != (self.detect is None):
            raise ValueError("stages.nouns and stages.detect go together: set both to null, or neither")
        return self


class DuplicateSettings(Settings):
    """Later copies of a picture, found over the whole source before the stages start."""

    remove: bool = True
    max_distance: int | None = Field(4, ge=0, le=8)  # bits of the 64 of a perceptual hash; null: only equal bytes


class EngineSettings(Settings):
    """How the work is done; none of it changes what the shards hold."""

    kind: Literal["local", "ray"] = "local"
    device: str = "auto"  # auto: every visible accelerator, else the CPU; or cpu, cuda:0 …
    workers: int | None = Field(None, ge=1)  # processes that hold models; null: one for each device
    threads: int | None = Field(None, ge=1)  # of torch and OpenCV in a worker; null: the cores shared among workers
    decoders: int = Field(2, ge=1)  # decoding processes of a worker
    prefetch: int = Field(64, ge=1)  # pictures being decoded ahead
    window: int = Field(32, ge=1)  # pictures that pass from step to step together: at least a stage's batch_size
    decode_timeout_s: float = Field(20.0, gt=0)  # a picture that takes longer is dropped
    attempts: int = Field(3, ge=1)  # workers that may die over one unit before the build gives up
    slice: str = "0/1"  # i/n: this run builds every n-th unit from the i-th; for arrays of jobs
    ray_address: str | None = None  # of a running cluster; null: what RAY_ADDRESS or `ray.init` finds
    ray_workers: int | None = Field(None, ge=1)  # actors; null: as many as the cluster has room for
    ray_gpus: float = Field(1.0, ge=0)  # accelerators of an actor, parts allowed; 0: CPU
    ray_cpus: float = Field(4.0, gt=0)  # cores of an actor

    @field_validator("slice")
    @classmethod
    def _slice(cls, text: str) -> str:
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if not found or not int(found[1]) < int(found[2]):
            raise ValueError("expected i/n with 0 <= i < n, such as 3/16")
        return text

    @property
    def slice_of(self) -> tuple[int, int]:
        """(i, n)."""
        number, count = self.slice.split("/")
        return int(number), int(count)


class DataSettings(Settings):
    """One build of a dataset."""

    source: SourceSettings
    output: str  # folder of the shards: a path or an fsspec URL such as s3://bucket/folder
    images: ImageSettings = ImageSettings()
    duplicates: DuplicateSettings = DuplicateSettings()
    checks: tuple[CheckSettings, ...] = ()  # optional: [{check: nsfw}, {check: faces}]
    stages: StageSettings = StageSettings()
    rules: RuleSettings = RuleSettings()
    engine: EngineSettings = EngineSettings()
    gallery: int = Field(60, ge=0, le=300)  # pictures on the gallery page; 0: no pages
