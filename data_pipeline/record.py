"""The record: what one sample of a shard says of itself. One typed, versioned schema for writers, readers and trainers.

A sample is `KEY.jpg`, `KEY.txt` (the caption), `KEY.json` (this record) and optional reference pictures
`KEY.ref0.png` … (RGBA cut-outs) in one tar. All pixel coordinates are those of the stored `KEY.jpg`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SCHEMA_VERSION = 1

BoxPx = tuple[float, float, float, float]  # xyxy, pixels of the stored picture; the far edges are exclusive


@dataclass(frozen=True)
class MaskRle:
    """A mask as COCO's compressed run lengths (column-major), as pycocotools writes them, counts as text."""

    size: tuple[int, int]  # height, width
    counts: str


@dataclass(frozen=True)
class Entity:
    """A thing that the caption names, with its place in the picture."""

    id: int  # position in the record
    noun: str  # head lemma: "car"
    phrase: str  # as it stands in the caption, from its first describing word on: "red sports car"
    caption_span: tuple[int, int] | None  # characters of the phrase in the caption; None: not in the caption
    box_xyxy_px: BoxPx
    score: float  # of the phrase in the box, 0..1
    mask: MaskRle
    mask_area_px: int
    subject_id: str | None = None  # equal ids are the same thing, across samples too
    references: tuple[str, ...] = ()  # members of the sample's tar, `KEY.ref0.png`: RGBA cut-outs of the same thing


@dataclass(frozen=True)
class Provenance:
    """What answered for one stage."""

    backend: str  # name in the configuration: blip2, spacy, grounding_dino …
    model: str = ""  # hub id or folder name
    revision: str = ""  # commit, version or content hash


@dataclass(frozen=True)
class Record:
    """All that is known of one sample."""

    key: str
    sha256: str  # of the source's image bytes, as they were found: take-downs name it
    width: int  # of the stored picture, pixels
    height: int
    caption: str
    alt_text: str
    entities: tuple[Entity, ...]
    url: str | None = None
    source_scores: Mapping[str, float] = field(default_factory=dict)  # similarity, punsafe, pwatermark, aesthetic …
    provenance: Mapping[str, Provenance] = field(default_factory=dict)  # caption, nouns, detect, segment -> who
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Sample:
    """A record with its bytes: what a shard holds of one sample."""

    record: Record
    jpeg: bytes
    references: Mapping[str, bytes] = field(default_factory=dict)  # member name -> PNG bytes


@dataclass(frozen=True)
class Drop:
    """A sample that was left out, and why."""

    key: str
    reason: str  # one of `reasons.REASONS`, or download_http_NNN; counted in the statistics
    detail: str = ""  # one line for a person
    url: str | None = None
    sha256: str = ""
    alt_text: str = ""
