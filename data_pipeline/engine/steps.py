"""The way of one picture from source to record, as steps over windows of pictures that are on their way together.

A step fills in what it finds and drops what breaks a rule; what is dropped passes the later steps untouched. Windows
never mix units and batches are cut from windows in a fixed order, so a unit built again is the same to the last byte.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from PIL import Image

from data_pipeline.build_settings import DataSettings
from data_pipeline.images import PreparedPicture
from data_pipeline.record import BoxPx, Drop, Entity, Provenance, Record, Sample
from data_pipeline.rules import RuleSettings, count_reason, keep_boxes, locate, mask_fills
from data_pipeline.shards.masks import encode_mask
from data_pipeline.sources import GivenEntity, SourceSample
from data_pipeline.stages import Captioner, Detector, NounChunk, NounFinder, PictureCheck, Segmenter

GIVEN = Provenance("given")  # the source itself
STAGES = ("caption", "nouns", "detect", "segment")


@dataclass
class Item:
    """One picture on its way."""

    sample: SourceSample
    picture: PreparedPicture | None = None
    caption: str | None = None  # None: not yet asked for
    chunks: tuple[NounChunk, ...] = ()
    places: list[Place] | None = None  # None: not yet looked for
    provenance: dict[str, Provenance] = field(default_factory=dict)
    drop: Drop | None = None

    def refuse(self, reason: str, detail: str = "") -> None:
        """Leave this picture out."""
        sha256 = self.sample.sha256 or (self.picture.sha256 if self.picture else "")
        self.drop = Drop(self.sample.key, reason, detail, self.sample.url, sha256, self.sample.alt_text)
        self.picture = None  # nobody needs the pixels any more


@dataclass
class Place:
    """An entity on its way."""

    noun: str
    phrase: str
    span: tuple[int, int] | None
    box_xyxy_px: BoxPx
    score: float
    mask: np.ndarray | None = None  # (H, W) bool
    subject_id: str | None = None
    references: tuple[bytes, ...] = ()

    def find_in(self, caption: str) -> None:
        """Set the span, and the phrase as it stands there, if the caption names this entity."""
        self.span = locate(self.phrase, caption)
        if self.span:
            self.phrase = caption[slice(*self.span)]


class Step(Protocol):
    """One step over a window of pictures."""

    name: str

    @property
    def provenance(self) -> Provenance:
        """Who answers."""
        ...

    def run(self, items: Sequence[Item]) -> None:
        """Work on those items that are still in."""
        ...


@dataclass
class CheckStep:
    name: str
    check: PictureCheck
    limit: float
    batch_size: int

    @property
    def provenance(self) -> Provenance:
        return self.check.provenance

    def run(self, items: Sequence[Item]) -> None:
        for batch in batches(items, self.batch_size):
            for item, score in zip(batch, self.check.score(pixels(batch)), strict=True):
                item.provenance[self.name] = self.provenance
                if score > self.limit:
                    item.refuse(self.name, f"{score:.3f} is above checks limit {self.limit}")


@dataclass
class CaptionStep:
    captioner: Captioner
    batch_size: int
    name: str = "caption"

    @property
    def provenance(self) -> Provenance:
        return self.captioner.provenance

    def run(self, items: Sequence[Item]) -> None:
        asked = [item for item in items if item.caption is None]
        for batch in batches(asked, self.batch_size):
            captions = self.captioner.caption(pixels(batch), [item.sample.alt_text for item in batch])
            for item, caption in zip(batch, captions, strict=True):
                item.caption = caption
                item.provenance[self.name] = self.provenance
                if not caption:
                    item.refuse("no_caption")


@dataclass
class NounStep:
    finder: NounFinder
    rules: RuleSettings
    name: str = "nouns"

    @property
    def provenance(self) -> Provenance:
        return self.finder.provenance

    def run(self, items: Sequence[Item]) -> None:
        asked = [item for item in alive(items) if item.sample.given is None and item.places is None]
        if not asked:
            return
        for item, chunks in zip(asked, self.finder.find([item.caption or "" for item in asked]), strict=True):
            item.chunks = chunks
            item.provenance[self.name] = self.provenance
            if reason := count_reason(len(chunks), self.rules.nouns, "nouns"):
                item.refuse(reason, f"{len(chunks)} in {item.caption!r}")


@dataclass
class DetectStep:
    detector: Detector | None  # None: only what the source itself knows
    rules: RuleSettings
    batch_size: int
    name: str = "detect"

    @property
    def provenance(self) -> Provenance:
        return self.detector.provenance if self.detector else GIVEN

    def run(self, items: Sequence[Item]) -> None:
        for item in alive(items):
            if item.sample.given is not None and item.places is None:
                item.places = given_places(item)
                item.provenance[self.name] = GIVEN
            for place in item.places or ():
                if place.span is None:
                    place.find_in(item.caption or "")
        if self.detector is not None:
            self._look(self.detector, [item for item in alive(items) if item.places is None])
        for item in alive(items):
            check_places(item, self.rules)

    def _look(self, detector: Detector, asked: Sequence[Item]) -> None:
        for batch in batches(asked, self.batch_size):
            scores = detector.detect(pixels(batch), [item.chunks for item in batch])
            for item, one in zip(batch, scores, strict=True):
                chunks = item.chunks
                item.places = [
                    Place(chunks[b.chunk].noun, chunks[b.chunk].text, chunks[b.chunk].span, b.box_xyxy_px, b.score)
                    for b in keep_boxes(one, self.rules)
                ]
                item.provenance[self.name] = self.provenance


@dataclass
class SegmentStep:
    segmenter: Segmenter
    rules: RuleSettings
    batch_size: int
    name: str = "segment"

    @property
    def provenance(self) -> Provenance:
        return self.segmenter.provenance

    def run(self, items: Sequence[Item]) -> None:
        asked = [item for item in alive(items) if any(place.mask is None for place in item.places or ())]
        for batch in batches(asked, self.batch_size):
            open_places = [[place for place in item.places or () if place.mask is None] for item in batch]
            masks = self.segmenter.segment(pixels(batch), [[p.box_xyxy_px for p in places] for places in open_places])
            for item, places, found in zip(batch, open_places, masks, strict=True):
                item.provenance[self.name] = self.provenance
                for place, mask in zip(places, found, strict=True):
                    place.mask = mask
        for item in alive(items):
            item.places = [
                p
                for p in item.places or ()
                if p.mask is not None and mask_fills(p.mask, p.box_xyxy_px, self.rules.min_mask_share)
            ]
            item.provenance.setdefault(self.name, GIVEN)
            check_places(item, self.rules)


def alive(items: Sequence[Item]) -> list[Item]:
    """Those that have not been dropped."""
    return [item for item in items if item.drop is None]


def pixels(items: Sequence[Item]) -> list[np.ndarray]:
    """Their pictures, each (H, W, 3) uint8."""
    return [item.picture.pixels for item in items if item.picture is not None]


def batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Cut those still in into batches of like shapes, so that little is padded; a function of the items alone."""
    order = sorted(alive(items), key=lambda item: _shape(item), reverse=True)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _shape(item: Item) -> tuple[float, int]:
    assert item.picture is not None
    return item.picture.width / item.picture.height, item.picture.width


def check_places(item: Item, rules: RuleSettings) -> None:
    """Drop a picture with too few or too many entities."""
    if reason := count_reason(len(item.places or ()), rules.entities, "entities"):
        item.refuse(reason, f"{len(item.places or ())} in {item.caption!r}")


def given_places(item: Item) -> list[Place]:
    """What the source knew, at the size of the stored picture."""
    picture, given = item.picture, item.sample.given
    assert picture is not None and given is not None
    shown = picture.source_width, picture.source_height  # boxes are given for the picture as it is shown
    if (shown[0] - shown[1]) * (picture.width - picture.height) < 0:  # EXIF turned it by a quarter
        shown = shown[1], shown[0]
    scale = picture.width / shown[0], picture.height / shown[1]
    places = []
    for entity in given:
        x0, y0, x1, y1 = entity.box_xyxy_px
        box = (
            min(max(x0 * scale[0], 0.0), picture.width - 1.0),
            min(max(y0 * scale[1], 0.0), picture.height - 1.0),
            min(x1 * scale[0], float(picture.width)),
            min(y1 * scale[1], float(picture.height)),
        )
        if box[2] - box[0] < 1 or box[3] - box[1] < 1:
            continue
        phrase = entity.phrase or entity.noun
        places.append(
            Place(
                entity.noun, phrase, None, box, 1.0, _given_mask(entity, picture), entity.subject_id, entity.references
            )
        )
    return places


def _given_mask(entity: GivenEntity, picture: PreparedPicture) -> np.ndarray | None:
    if entity.mask_png is None:
        return None
    mask = Image.open(io.BytesIO(entity.mask_png)).convert("L")
    resized = mask.resize((picture.width, picture.height), Image.Resampling.NEAREST)
    return np.asarray(resized) > 0


def finished(item: Item) -> Sample:
    """The sample that goes into the shard."""
    picture, key = item.picture, item.sample.key
    assert picture is not None and item.caption is not None
    references: dict[str, bytes] = {}
    entities = []
    for number, place in enumerate(item.places or ()):
        assert place.mask is not None
        names = [f"{key}.ref{len(references) + i}.png" for i in range(len(place.references))]
        references.update(zip(names, place.references, strict=True))
        entities.append(
            Entity(
                id=number,
                noun=place.noun,
                phrase=place.phrase,
                caption_span=place.span,
                box_xyxy_px=place.box_xyxy_px,
                score=place.score,
                mask=encode_mask(place.mask),
                mask_area_px=int(place.mask.sum()),
                subject_id=place.subject_id,
                references=tuple(names),
            )
        )
    record = Record(
        key=key,
        sha256=item.sample.sha256 or picture.sha256,
        width=picture.width,
        height=picture.height,
        caption=item.caption,
        alt_text=item.sample.alt_text,
        entities=tuple(entities),
        url=item.sample.url,
        source_scores=item.sample.scores,
        provenance=item.provenance,
    )
    return Sample(record, picture.jpeg, references)


def load_steps(settings: DataSettings, device: str, first: str = "") -> list[Step]:
    """Load the models onto `device`: of every stage and check, or of the stages from `first` on.

    Raises:
        UserError: a model cannot be loaded.
    """
    stages, rules = settings.stages, settings.rules
    steps: list[Step] = []
    if not first:
        steps += [CheckStep(c.check, c.load(device), c.limit, c.batch_size) for c in settings.checks]
    if first in ("", "caption"):
        steps.append(CaptionStep(stages.caption.load(device), stages.caption.batch_size))
    if first != "segment" and stages.nouns:  # the detector reads the chunks, which records do not hold
        steps.append(NounStep(stages.nouns.load(device), rules))
    if first != "segment":
        detect = stages.detect
        steps.append(DetectStep(detect.load(device) if detect else None, rules, detect.batch_size if detect else 1))
    return [*steps, SegmentStep(stages.segment.load(device), rules, stages.segment.batch_size)]
