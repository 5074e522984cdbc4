"""Pictures of LAION and its like: metadata parquet -> filters -> img2dataset -> shards, which are then read.

    DOWNLOAD/metadata/00000.parquet …   the rows that passed the filters; no other one is ever asked for
    DOWNLOAD/shards/00000.tar …         what img2dataset made of them
    DOWNLOAD/log.txt                    what it said

`fetch()` downloads and may be called again after any interruption: complete shards are not fetched twice. Servers that
forbid the use by `X-Robots-Tag` are obeyed, private addresses refused. Use Re-LAION-5B research-safe or your own table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from data_pipeline.errors import UserError
from data_pipeline.record import Drop
from data_pipeline.settings import Settings
from data_pipeline.sources import SourceSample, Unit
from data_pipeline.sources.download.environment import prepare_environment
from data_pipeline.sources.download.failures import read_failures
from data_pipeline.sources.download.running import Progress, complete_shards, remove_half_written, run_download
from data_pipeline.sources.download.selection import ALIASES, Filters, Selection, select
from data_pipeline.sources.files import find_files, open_place
from data_pipeline.sources.metadata import SCORE_NAMES
from data_pipeline.sources.webdataset_shards import failures_path, read_shard

ROBOTS_DIRECTIVES = ("noai", "noimageai", "noindex", "noimageindex")


class LaionSettings(Settings):
    """A table of URLs and what to fetch of it."""

    kind: Literal["laion"] = "laion"
    metadata: str | tuple[str, ...]  # parquet files, folders or globs; paths or fsspec URLs
    download: str  # local folder of the downloaded shards
    columns: Mapping[str, str] = {}  # "url: LINK" where a column is not called as LAION does (URL, TEXT, WIDTH …)

    # Filters before any request; null: not asked. A row without the value does not pass. Defaults as for SD 2.
    min_longer_side_px: int | None = Field(600, ge=1)  # by WIDTH and HEIGHT
    max_punsafe: float | None = 0.1
    max_pwatermark: float | None = 0.5
    min_aesthetic: float | None = None
    min_similarity: float | None = None

    allow_hosts: tuple[str, ...] = ()  # names or addresses that may be, or resolve to, private ones: your own mirror
    timeout_s: float = Field(10.0, gt=0)  # without a byte
    deadline_s: float = Field(60.0, gt=0)  # for a whole picture, redirects included
    max_image_mb: float = Field(64.0, gt=0)  # of a body; the transfer ends there
    max_image_mpx: float = Field(100.0, gt=0)  # millions of pixels that are decoded at most
    retries: int = Field(1, ge=0)  # of a picture
    user_agent_token: str | None = None  # how servers may name you in X-Robots-Tag, and see you in their logs
    # Longer side; larger pictures are made smaller, as JPEG 95, which loses the rotation that EXIF told. null: bytes
    # are kept as they came, about three times as many.
    image_size: int | None = Field(1024, ge=64)
    processes: int = Field(4, ge=1)  # each works on a shard
    threads: int = Field(64, ge=1)  # of a process: pictures on their way at a time
    number_sample_per_shard: int = Field(10_000, ge=1, le=1_000_000)

    environment: str | None = None  # folder of img2dataset's own environment; null: below ~/.cache/subject-diffusion
    python: str | None = None  # makes that environment, 3.10 to 3.12; null: the Python that runs this

    @field_validator("columns")
    @classmethod
    def _known(cls, columns: Mapping[str, str]) -> Mapping[str, str]:
        if unknown := sorted(set(columns) - set(ALIASES)):
            raise ValueError(f"unknown {unknown[0]}; expected {', '.join(ALIASES)}")
        return columns

    def open(self) -> LaionSource:
        """The table's pictures. Nothing is fetched before `fetch()`.

        Raises:
            UserError: the download folder is in an object store.
        """
        if "://" in self.download:
            raise UserError(f"source.download={self.download}: img2dataset needs a local folder here")
        return LaionSource(self)


@dataclass(frozen=True)
class LaionSource:
    """See the module's text."""

    settings: LaionSettings

    @cached_property
    def folder(self) -> Path:
        return Path(self.settings.download).expanduser().absolute()

    @cached_property
    def selection(self) -> Selection:
        """The rows that are asked for, and how many of the others each filter kept out; reads the metadata once.

        Raises:
            UserError: as `select`.
        """
        from filelock import FileLock

        settings = self.settings
        filters = Filters(
            settings.min_longer_side_px,
            settings.max_punsafe,
            settings.max_pwatermark,
            settings.min_aesthetic,
            settings.min_similarity,
        )
        files = find_files(settings.metadata, ".parquet", "source.metadata")
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "metadata.lock"):
            selection = select(
                files, settings.columns, filters, settings.number_sample_per_shard, self.folder / "metadata"
            )
        if selection.rows == 0:
            told = ", ".join(f"{name} {count}" for name, count in selection.left_out.items())
            raise UserError(f"source.metadata={settings.metadata}: no row passes the filters (left out: {told})")
        return selection

    def units(self) -> list[Unit]:
        """A unit for each shard that is or will be downloaded."""
        return [Unit(name, count, {}) for name, count in self._shards().items()]

    def fetch(self, progress: Progress | None = None) -> None:
        """Download what is missing; two builders on one folder take turns.

        Args:
            progress: told twice a second how many pictures were tried, and how many there are.
        Raises:
            UserError: img2dataset cannot be installed, or ended early; complete shards stay.
        """
        from filelock import FileLock

        shards, target = self._shards(), self.folder / "shards"
        if len(complete_shards(target, shards)) == len(shards):
            return
        target.mkdir(exist_ok=True)
        with FileLock(self.folder / "download.lock"):
            remove_half_written(target)
            if len(complete_shards(target, shards)) == len(shards):
                return
            python = prepare_environment(self.settings.environment, self.settings.python)
            run_download(
                python,
                self._order(target),
                shards,
                target,
                self.folder / "log.txt",
                stall_s=self._longest_shard_s(),
                progress=progress,
            )

    def samples(self, unit: Unit) -> Iterator[SourceSample | Drop]:
        """The shard's pictures, then the rows that could not be downloaded, with the reason.

        Raises:
            UserError: the shard is not downloaded yet.
        """
        target = self.folder / "shards"
        if not complete_shards(target, [unit.name]):
            raise UserError(f"source.download={self.folder}: {unit.name} is not downloaded yet; call fetch() first")
        place = open_place(str(target / f"{unit.name}.tar"), "source.download")
        yield from read_shard(place, unit.name, int(self.settings.max_image_mb * 1e6))
        yield from read_failures(place, failures_path(place.path), unit.name)

    def _shards(self) -> dict[str, int]:
        """Pictures of each shard, by its name."""
        rows, size = self.selection.rows, self.settings.number_sample_per_shard
        return {f"{start // size:05d}": min(size, rows - start) for start in range(0, rows, size)}

    def _longest_shard_s(self) -> float:
        """No shard can take longer if every picture takes all the time it may."""
        settings = self.settings
        rounds = math.ceil(settings.number_sample_per_shard / settings.threads)
        return 120 + rounds * (1 + settings.retries) * settings.deadline_s + settings.number_sample_per_shard

    def _order(self, target: Path) -> dict[str, dict[str, object]]:
        settings = self.settings
        resizing: dict[str, object] = {"disable_all_reencoding": True}
        if settings.image_size is not None:
            resizing = {
                "image_size": settings.image_size,
                "resize_mode": "keep_ratio_largest",
                "resize_only_if_bigger": True,
                "skip_reencode": True,
                "encode_quality": 95,
            }
        return {
            "limits": {
                "allow_hosts": sorted(host.lower().rstrip(".") for host in settings.allow_hosts),
                "max_bytes": int(settings.max_image_mb * 1e6),
                "max_pixels": int(settings.max_image_mpx * 1e6),
                "deadline_s": settings.deadline_s,
            },
            "download": {
                "url_list": str(self.folder / "metadata"),
                "input_format": "parquet",
                "url_col": "url",
                "caption_col": "caption",
                "save_additional_columns": list(SCORE_NAMES),
                "output_folder": str(target),
                "output_format": "webdataset",
                "processes_count": settings.processes,
                "thread_count": settings.threads,
                "number_sample_per_shard": settings.number_sample_per_shard,
                "timeout": settings.timeout_s,
                "retries": settings.retries,
                "user_agent_token": settings.user_agent_token,
                "disallowed_header_directives": list(ROBOTS_DIRECTIVES),
                "compute_hash": "sha256",
                "extract_exif": False,
                "incremental_mode": "incremental",
                "enable_wandb": False,
                **resizing,
            },
        }
