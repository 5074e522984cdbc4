"""Scenes of the embedded toybox as a source: pictures with captions and, if asked for, the truth about them.

`entities: found` gives what a photo would: picture and caption, so that the stages have to find everything (and their
quality can be measured). `entities: true` gives boxes, masks, subject ids and references: pairs to train on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from data_pipeline.errors import UserError
from data_pipeline.record import Drop
from data_pipeline.settings import Settings
from data_pipeline.sources import GivenEntity, SourceSample, Unit

if TYPE_CHECKING:
    from data_pipeline.toybox.world import ToyboxEntity, ToyboxWorld


class ToyboxSettings(Settings):
    """Rendered scenes; equal settings give equal scenes to the last byte."""

    kind: Literal["toybox"] = "toybox"
    split: Literal["train", "val", "heldout"] = "train"  # whose subjects are drawn
    seed: int = Field(0, ge=0)  # other scenes of the same subjects
    size: int = Field(256, ge=32, le=2048)  # side of a picture, pixels
    scenes: int = Field(256, ge=1)  # how many
    shard_size: int = Field(64, ge=1)  # scenes of a shard
    entities: Literal["found", "true"] = "found"  # whether the stages find the entities or the source gives them
    min_subjects: int = Field(1, ge=0)  # fewest in a scene
    max_subjects: int = Field(4, ge=0)  # most in a scene, at most 12
    procedural_share: float | None = Field(None, ge=0, le=1)  # of made-up subjects; null: 0.4 in train, else none
    reference_size: int = Field(128, ge=16, le=1024)  # side of a reference, pixels

    @field_validator("entities", mode="before")
    @classmethod
    def _word(cls, value: Any) -> Any:
        return "true" if value is True else value  # how YAML reads the bare word

    def open(self) -> ToyboxSource:
        """The scenes.

        Raises:
            UserError: numbers that do not go together.
        """
        source = ToyboxSource(self)
        try:
            _ = source.world
        except ValueError as error:
            raise UserError(f"source: {error}") from error
        return source


@dataclass(frozen=True)
class ToyboxSource:
    """See the module's text."""

    settings: ToyboxSettings

    @cached_property
    def world(self) -> ToyboxWorld:
        from data_pipeline.toybox.world import ToyboxWorld

        settings = self.settings
        return ToyboxWorld(
            settings.split,
            seed=settings.seed,
            size=settings.size,
            reference_size=settings.reference_size,
            min_subjects=settings.min_subjects,
            max_subjects=settings.max_subjects,
            procedural_share=settings.procedural_share,
        )

    def units(self) -> list[Unit]:
        """Ranges of scene numbers."""
        total, size = self.settings.scenes, self.settings.shard_size
        return [
            Unit(f"{start // size:05d}", stop - start, {"first": start, "stop": stop})
            for start in range(0, total, size)
            for stop in [min(start + size, total)]
        ]

    def samples(self, unit: Unit) -> Iterator[SourceSample | Drop]:
        """The scenes of the range; none is ever dropped."""
        for index in range(unit.parts["first"], unit.parts["stop"]):
            scene = self.world.scene(index)
            given = None
            if self.settings.entities == "true":
                given = tuple(_given(entity) for entity in scene.entities)  # in the order of the caption
            key = f"{self.settings.split}-{self.settings.seed}-{index:06d}"
            yield SourceSample(key, _png(scene.image), scene.caption, given=given)


def _given(entity: ToyboxEntity) -> GivenEntity:
    return GivenEntity(
        noun=entity.noun,
        phrase=entity.noun,
        box_xyxy_px=entity.box_xyxy_px,
        mask_png=_png(entity.mask.astype("uint8") * 255),
        subject_id=entity.subject.id,
        references=tuple(_png(view) for view in entity.references),
    )


def _png(pixels: Any) -> bytes:
    """(H, W), (H, W, 3) or (H, W, 4) uint8 as PNG."""
    from PIL import Image

    from data_pipeline.sources.given import png_of

    return png_of(Image.fromarray(pixels))
