"""WebDataset shards as img2dataset writes them: one input tar becomes one shard and keeps its name.

    00017.tar            KEY.jpg (or png, webp …), KEY.txt, KEY.json {url, caption, similarity, punsafe, sha256, …}
    00017.parquet        the same metadata with the pictures that could not be fetched, optional
    00017_stats.json     written last: the sign that the tar is complete, optional

Tars are read from front to back; of a damaged one, what came before the damage is kept and the rest is one drop.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.record import Drop
from data_pipeline.settings import Settings
from data_pipeline.sources import SourceSample, Unit
from data_pipeline.sources.download.failures import read_failures
from data_pipeline.sources.files import FileRefused, Place, find_files, open_place
from data_pipeline.sources.keys import clean_key, faithful_key, unique_keys
from data_pipeline.sources.metadata import MAX_TEXT_BYTES, Metadata, read_metadata, read_text
from data_pipeline.sources.tar_groups import BrokenTar, TarGroup, read_groups

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff")  # in order of preference


class WebDatasetSettings(Settings):
    """Tars of pictures with texts and metadata."""

    kind: Literal["webdataset"] = "webdataset"
    paths: str | tuple[str, ...]  # folders, globs or tars; paths or fsspec URLs such as s3://bucket/shards/*.tar
    require_stats: bool = False  # only tars that are complete: with NNNNN_stats.json beside them
    count_failures: bool = True  # rows of NNNNN.parquet that were not downloaded count as dropped, by reason
    prefix_keys: bool = False  # the shard's name before each key: for shards whose keys repeat from tar to tar
    max_image_mb: float = Field(64.0, gt=0)  # larger members are dropped unread

    def open(self) -> WebDatasetSource:
        """The shards' pictures."""
        return WebDatasetSource(self)


@dataclass(frozen=True)
class WebDatasetSource:
    """See the module's text."""

    settings: WebDatasetSettings

    def units(self) -> list[Unit]:
        """A unit for each tar, by path; two tars of one name get their folders' names before it.

        Raises:
            UserError: there are no tars, or none is complete.
        """
        files = find_files(self.settings.paths, ".tar", "source.paths")
        if self.settings.require_stats:
            files = [(place, path) for place, path in files if place.system.exists(stats_path(path))]
            if not files:
                raise UserError(
                    f"source.paths={self.settings.paths}: no tar with its _stats.json; wait for the download to "
                    "finish, or set source.require_stats=false"
                )
        urls = [place.url(path) for place, path in files]
        names = unique_keys([PurePosixPath(url).stem for url in urls], urls)
        return [
            Unit(name, self._count(place, path), {"tar": url})
            for name, url, (place, path) in zip(names, urls, files, strict=True)
        ]

    def samples(self, unit: Unit) -> Iterator[SourceSample | Drop]:
        """The tar's pictures, then the ones that could not be downloaded."""
        place = open_place(unit.parts["tar"], "source.paths")
        prefix = f"{unit.name}-" if self.settings.prefix_keys else ""
        yield from read_shard(place, unit.name, int(self.settings.max_image_mb * 1e6), prefix)
        if self.settings.count_failures:
            yield from read_failures(place, failures_path(place.path), unit.name, prefix)

    def _count(self, place: Place, path: str) -> int | None:
        return read_count(place, path, self.settings.count_failures) if self.settings.require_stats else None


def stats_path(tar: str) -> str:
    """img2dataset's sign of completion for a tar."""
    return tar[: -len(".tar")] + "_stats.json"


def failures_path(tar: str) -> str:
    """img2dataset's table of all rows of a tar."""
    return tar[: -len(".tar")] + ".parquet"


def read_count(place: Place, tar: str, with_failures: bool) -> int | None:
    """Samples of a complete tar; None: it is not complete, or does not say."""
    try:
        with place.system.open(stats_path(tar), "rb") as file:
            stats = json.loads(file.read(MAX_TEXT_BYTES))
        return int(stats["count" if with_failures else "successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_shard(place: Place, name: str, max_image_bytes: int, prefix: str = "") -> Iterator[SourceSample | Drop]:
    """The pictures of one tar, which is called `name` in what is said of it."""
    limits = {**dict.fromkeys(IMAGE_SUFFIXES, max_image_bytes), "txt": MAX_TEXT_BYTES, "json": MAX_TEXT_BYTES}
    seen: set[str] = set()
    try:
        with place.system.open(place.path, "rb") as file:
            for group in read_groups(file, limits):
                key = prefix + faithful_key(group.key)
                yield Drop(key, "repeated_key", ascii(group.key[:200])) if key in seen else _sample(group, key)
                seen.add(key)
    except (BrokenTar, OSError, ValueError) as error:
        yield Drop(clean_key(name), "broken_tar", f"{place.path} after {len(seen)} samples: {error}")


def _sample(group: TarGroup, key: str) -> SourceSample | Drop:
    if group.fault is not None:
        return Drop(key, *group.fault)
    metadata, alt_text = Metadata(), ""
    if "txt" in group.members:
        alt_text = read_text(group.members["txt"])
    try:
        if "json" in group.members:
            metadata = read_metadata(group.members["json"], f"{key}.json")
    except FileRefused as refusal:
        return Drop(key, refusal.reason, refusal.detail, alt_text=alt_text)
    alt_text = alt_text or metadata.alt_text
    image = next((group.members[suffix] for suffix in IMAGE_SUFFIXES if suffix in group.members), None)
    if image is None or metadata.failure:
        reason = "download_failed" if metadata.failure else "no_image"
        return Drop(key, reason, metadata.failure, metadata.url, metadata.sha256, alt_text)
    return SourceSample(key, image, alt_text, metadata.url, metadata.scores, sha256=metadata.sha256)
