"""A folder of pictures, local or in an object store, with optional captions, metadata and entities beside them.

    NAME.jpg             the picture (also png, webp …)
    NAME.txt             its alt text, optional
    NAME.json            optional: {"url": …, "caption": …, "aesthetic": 6.1, "entities": [ENTITY, …]}
    NAME.mask0.png …     what ENTITYs name; files with .mask or .ref in their name, and all in folders that start with
    NAME.ref0.png …      "_" or ".", are no pictures of their own

    ENTITY: {"noun": "dog", "phrase": "a brown dog", "box_xyxy_px": [x0, y0, x1, y1], "mask": "NAME.mask0.png",
             "subject_id": "rex", "references": ["NAME.ref0.png"]}

With "entities" (an empty list too) the picture is not searched: this imports pairs made elsewhere. Box and mask are in
pixels of the picture as it is shown (rotated as its EXIF says); the mask is one channel of that size, nonzero inside;
references are RGBA cut-outs of the same thing. File names are relative to the JSON and stay below the source's folder.
All names are listed before the first picture is read, about 300 bytes each: beyond some millions make shards first.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Literal

from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.record import Drop
from data_pipeline.settings import Settings
from data_pipeline.sources import GivenEntity, SourceSample, Unit
from data_pipeline.sources.files import FileRefused, Place, list_files, open_place, read_file
from data_pipeline.sources.given import picture_size, read_entities
from data_pipeline.sources.keys import unique_keys
from data_pipeline.sources.metadata import MAX_TEXT_BYTES, Metadata, read_metadata, read_text

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")


class FolderSettings(Settings):
    """A folder of pictures."""

    kind: Literal["folder"] = "folder"
    path: str  # the folder: a path or an fsspec URL such as s3://bucket/photos
    recursive: bool = True  # its subfolders too
    shard_size: int = Field(1000, ge=1)  # pictures of a shard
    captions: str | None = ".txt"  # suffix of the file with the alt text; null: there are none
    max_image_mb: float = Field(64.0, gt=0)  # larger files are dropped unread

    def open(self) -> FolderSource:
        """The folder's pictures.

        Raises:
            UserError: no such folder.
        """
        place = open_place(self.path, "source.path")
        if not place.system.isdir(place.path):
            raise UserError(f"source.path={self.path}: no such folder; give one that holds pictures")
        return FolderSource(self)


@dataclass(frozen=True)
class FolderSource:
    """See the module's text."""

    settings: FolderSettings

    @cached_property
    def place(self) -> Place:
        return open_place(self.settings.path, "source.path")

    def units(self) -> list[Unit]:
        """`shard_size` pictures each, in the order of their paths.

        Raises:
            UserError: there are no pictures.
        """
        files = list_files(self.place, recursive=self.settings.recursive)
        present = set(files)
        paths = [path for path in files if is_picture(path)]
        if not paths:
            raise UserError(
                f"source.path={self.settings.path}: no pictures there; expected files that end in "
                f"{', '.join(IMAGE_SUFFIXES)}"
            )
        keys = unique_keys([str(PurePosixPath(path).with_suffix("")) for path in paths], paths)
        suffix = self.settings.captions
        rows = [
            # 1 where there is such a file, so that an object store is not asked for what is not there
            [
                path,
                key,
                int(suffix is not None and _beside(path, suffix) in present),
                int(_beside(path, ".json") in present),
            ]
            for path, key in zip(paths, keys, strict=True)
        ]
        size = self.settings.shard_size
        return [
            Unit(f"{start // size:05d}", len(part), {"pictures": part})
            for start in range(0, len(rows), size)
            for part in [rows[start : start + size]]
        ]

    def samples(self, unit: Unit) -> Iterator[SourceSample | Drop]:
        """The unit's pictures; a file that cannot be read or a JSON that does not fit is a `Drop`."""
        for path, key, has_text, has_json in unit.parts["pictures"]:
            metadata, alt_text = Metadata(), ""
            try:
                image = self._read(path, int(self.settings.max_image_mb * 1e6))
                if has_text:
                    alt_text = read_text(self._read(_beside(path, self.settings.captions or ""), MAX_TEXT_BYTES))
                if has_json:
                    name = _beside(path, ".json")
                    metadata = read_metadata(self._read(name, MAX_TEXT_BYTES), name)
                given = self._given(path, image, metadata)
            except FileRefused as refusal:
                detail = refusal.detail.encode("utf-8", "replace").decode()
                yield Drop(key, refusal.reason, detail, metadata.url, alt_text=alt_text or metadata.alt_text)
                continue
            yield SourceSample(
                key, image, alt_text or metadata.alt_text, metadata.url, metadata.scores, given, metadata.sha256
            )

    def _read(self, path: str, limit: int) -> bytes:
        try:
            return read_file(self.place, f"{self.place.path.rstrip('/')}/{path}", limit)
        except FileNotFoundError as error:
            raise FileRefused("unreadable", f"{path}: not there") from error

    def _given(self, path: str, image: bytes, metadata: Metadata) -> tuple[GivenEntity, ...] | None:
        if metadata.entities is None:
            return None
        size = picture_size(image)
        if size is None:
            return ()  # the decoder says what is wrong with it
        name, folder = _beside(path, ".json"), posixpath.dirname(path)

        def read(file: str) -> bytes:
            inside = posixpath.normpath(posixpath.join(folder, file))
            if posixpath.isabs(file) or inside.startswith("..") or "\\" in file or "\0" in file:
                raise FileRefused("bad_metadata", f"{name}: {file!r} leads out of the source's folder")
            return self._read(inside, int(self.settings.max_image_mb * 1e6))

        return read_entities(metadata.entities, read, size, name)


def is_picture(path: str) -> bool:
    """Whether a file is a picture of its own, by its name."""
    parts = PurePosixPath(path).parts
    if any(part.startswith("_") for part in parts[:-1]) or re.search(r"\.(mask|ref)\d*\.[^.]+$", parts[-1]):
        return False
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def _beside(path: str, suffix: str) -> str:
    return str(PurePosixPath(path).with_suffix("")) + suffix
