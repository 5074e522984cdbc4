"""OpenImages V7: its boxes, class names and masks become the entities, without detector; see openimages_tables.

    FOLDER/images/**/IMAGE_ID.jpg                              as its archives unpack; any part of the split
    FOLDER/oidv6-train-annotations-bbox.csv                    (validation-…, test-…)
    FOLDER/oidv7-class-descriptions-boxable.csv                or class-descriptions-boxable.csv
    FOLDER/train-annotations-object-segmentation.csv           with FOLDER/masks/: outlines, optional; where there is
                                                               none the segmenter makes it

Boxes of groups and boxes seen from inside are left out. A picture's boxes are fractions of it: its header is read.
Memory of a process: 25 bytes a box and 80 a mask, twice that while reading; about 0.6 GB for the training split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.record import Drop
from data_pipeline.settings import Settings
from data_pipeline.sources import GivenEntity, SourceSample, Unit
from data_pipeline.sources.files import FileRefused, Place, list_files, open_place, read_file
from data_pipeline.sources.folder import IMAGE_SUFFIXES
from data_pipeline.sources.given import mask_at, picture_size
from data_pipeline.sources.keys import unique_keys

if TYPE_CHECKING:
    from data_pipeline.sources.openimages_tables import AnnotatedBox, BoxTable, MaskTable

MAX_MASK_BYTES = 16_000_000


class OpenImagesSettings(Settings):
    """A split of OpenImages, as published. Names are relative to `folder`; null: the published ones."""

    kind: Literal["openimages"] = "openimages"
    folder: str  # holds all of it: a path or an fsspec URL
    split: Literal["train", "validation", "test"] = "train"
    images: str = "images"  # folder of the pictures, IMAGE_ID.jpg, subfolders allowed
    boxes: str | None = None  # CSV: ImageID, LabelName, XMin, XMax, YMin, YMax, IsGroupOf, IsDepiction …
    class_names: str | None = None  # CSV: label, name
    masks: str | None = None  # CSV: MaskPath, ImageID, LabelName, BoxXMin …
    mask_folder: str = "masks"  # PNG files of the masks, with or without their archives' folders
    body_parts: bool = False  # boxes of "human face", "human hand" … too
    depictions: bool = True  # boxes of drawings and toys of the thing too
    min_confidence: float = Field(0.5, ge=0, le=1)  # of the people who drew the box
    shard_size: int = Field(1000, ge=1)  # pictures of a shard
    max_image_mb: float = Field(64.0, gt=0)  # larger files are dropped unread

    def open(self) -> OpenImagesSource:
        """The split's pictures.

        Raises:
            UserError: a file or folder that is needed is missing.
        """
        source = OpenImagesSource(self)
        for name in (source.boxes_file, source.names_file):
            source.exists(name, needed=True)
        if self.masks is not None:
            source.exists(self.masks, needed=True)
        return source


@dataclass(frozen=True)
class OpenImagesSource:
    """See the module's text."""

    settings: OpenImagesSettings

    @cached_property
    def place(self) -> Place:
        return open_place(self.settings.folder, "source.folder")

    @property
    def boxes_file(self) -> str:
        split = self.settings.split
        return self.settings.boxes or f"{'oidv6-' if split == 'train' else ''}{split}-annotations-bbox.csv"

    @property
    def names_file(self) -> str:
        published = ("oidv7-class-descriptions-boxable.csv", "class-descriptions-boxable.csv")
        return self.settings.class_names or next((name for name in published if self.exists(name)), published[0])

    @cached_property
    def boxes(self) -> BoxTable:
        """All boxes that are kept; read once a process.

        Raises:
            UserError: a CSV that cannot be read, or a column missing.
        """
        from data_pipeline.sources.openimages_tables import read_boxes, read_class_names

        settings = self.settings
        names = read_class_names(self.place, self.path(self.names_file), settings.body_parts)
        return read_boxes(self.place, self.path(self.boxes_file), names, settings.depictions, settings.min_confidence)

    @cached_property
    def masks(self) -> MaskTable | None:
        """Where the masks are; None: the split is used without.

        Raises:
            UserError: as `boxes`.
        """
        from data_pipeline.sources.openimages_tables import read_masks

        name = self.settings.masks or f"{self.settings.split}-annotations-object-segmentation.csv"
        return read_masks(self.place, self.path(name)) if self.exists(name) else None

    def path(self, name: str) -> str:
        return f"{self.place.path.rstrip('/')}/{name}"

    def exists(self, name: str, needed: bool = False) -> bool:
        found = bool(self.place.system.exists(self.path(name)))
        if needed and not found:
            raise UserError(
                f"source.folder={self.settings.folder}: no {name} there; download it from OpenImages, or say where it "
                "is with source.boxes, source.class_names or source.masks"
            )
        return found

    def units(self) -> list[Unit]:
        """`shard_size` pictures each, by path. The annotations are not read for this.

        Raises:
            UserError: no pictures.
        """
        files = list_files(Place(self.place.system, self.path(self.settings.images)))
        paths = [path for path in files if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES]
        if not paths:
            raise UserError(
                f"source.images={self.path(self.settings.images)}: no pictures there; expected IMAGE_ID.jpg"
            )
        keys = unique_keys([PurePosixPath(path).stem for path in paths], paths)
        rows = [[path, key] for path, key in zip(paths, keys, strict=True)]
        size = self.settings.shard_size
        return [
            Unit(f"{start // size:05d}", len(part), {"pictures": part})
            for start in range(0, len(rows), size)
            for part in [rows[start : start + size]]
        ]

    def samples(self, unit: Unit) -> Iterator[SourceSample | Drop]:
        """The unit's pictures with their entities; one without any is a `Drop`."""
        pictures: Sequence[tuple[str, str]] = unit.parts["pictures"]
        ids = [PurePosixPath(path).stem for path, _ in pictures]
        boxes = self.boxes.of_images(ids)
        masks = self.masks.of_images(ids) if self.masks is not None else [[] for _ in ids]
        for (path, key), of_picture, outlines in zip(pictures, boxes, masks, strict=True):
            if not of_picture:
                yield Drop(key, "no_given_entities", path)
                continue
            try:
                name = self.path(f"{self.settings.images.rstrip('/')}/{path}")
                image = read_file(self.place, name, int(self.settings.max_image_mb * 1e6))
            except (FileRefused, FileNotFoundError) as refusal:
                reason = refusal.reason if isinstance(refusal, FileRefused) else "unreadable"
                yield Drop(key, reason, str(refusal))
                continue
            size = picture_size(image)
            given = () if size is None else tuple(self._given(box, outlines, size) for box in of_picture)
            yield SourceSample(key, image, given=given)

    def _given(
        self, box: AnnotatedBox, outlines: Sequence[tuple[AnnotatedBox, str]], size: tuple[int, int]
    ) -> GivenEntity:
        width, height = size
        x0, y0, x1, y1 = box.xyxy
        name = next((name for outlined, name in outlines if outlined.is_same(box)), None)
        return GivenEntity(
            noun=self.boxes.nouns[box.label],
            box_xyxy_px=(x0 * width, y0 * height, x1 * width, y1 * height),
            mask_png=self._mask(name, size) if name is not None else None,
        )

    def _mask(self, name: str, size: tuple[int, int]) -> bytes | None:
        """The mask at the picture's size; None, so that the segmenter makes it: it is missing or damaged."""
        if PurePosixPath(name).name != name:
            return None  # leads elsewhere
        # Masks come in sixteen archives by the first letter of their name, unpacked together or each by itself.
        for folder in ("", f"{name[0]}/", f"{self.settings.split}-masks-{name[0]}/"):
            try:
                data = read_file(self.place, self.path(f"{self.settings.mask_folder}/{folder}{name}"), MAX_MASK_BYTES)
            except FileNotFoundError:
                continue
            except FileRefused:
                return None
            return mask_at(data, size, resize=True)
        return None
