"""A sample of a shard as a scene: a square at training size with its caption, the entities that pass, their references.

Stands between the stream, which hands out encoded samples in their order, and `prepared_scenes.py`. A scene is a
function of the sample, its seed and the settings; only what is used is decoded.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import cv2
import numpy as np
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.images import FORMATS, decode_reference
from data_pipeline.record import BoxPx, Entity, Sample
from data_pipeline.shards.reader import decode_sample
from data_pipeline.toybox.world import box_of
from train.data.entity_filters import Candidate, eligible, placed_well
from train.settings import DataSettings, EntityFilters

CROP, CHOICE = 0, 1  # purposes of random numbers, after the sample's seed


class EncodedSample(Protocol):
    """What a scene is made from: `train.stream`'s StreamSample."""

    @property
    def shard(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def sample(self) -> Sample: ...
    @property
    def seed(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class ShardEntity:
    """A subject of a scene."""

    noun: str
    span: tuple[int, int] | None  # characters in the caption
    box_xyxy_px: BoxPx  # tight around the mask
    mask: np.ndarray  # (size, size) bool
    references: tuple[np.ndarray, ...]  # each (h, w, 4) uint8 RGBA; none where they are cut from the picture itself


@dataclass(frozen=True)
class ShardScene:
    """A square of a sample's picture."""

    key: str  # shard/key
    image: np.ndarray  # (size, size, 3) uint8
    caption: str
    entities: tuple[ShardEntity, ...]
    drops: Mapping[str, int]  # entities left out, by reason


@dataclass(frozen=True)
class Square:
    """A square of a picture, at training size."""

    pixels: np.ndarray  # (size, size, 3) uint8
    masks: list[np.ndarray]  # each (size, size) bool
    boxes: list[BoxPx]  # clipped to the square, in its pixels
    seen: list[float]  # share of each box, along the cut side, that it shows


def scene_of(
    stream_sample: EncodedSample, data: DataSettings, filters: EntityFilters, nouns: frozenset[str] | None
) -> ShardScene:
    """Decode, cut the square, choose entities and references.

    Args:
        nouns: only entities with one of them are kept; None: any.
    Raises:
        UserError: the sample is damaged.
    """
    record, seed = stream_sample.sample.record, stream_sample.seed
    other_image = data.references.source == "other_image"
    drops: Counter[str] = Counter()
    entities = eligible(record.entities, filters, nouns, other_image, drops)
    where = f"{stream_sample.shard}/{stream_sample.key}"
    wanted = Sample(replace(record, entities=tuple(entities)), stream_sample.sample.jpeg)
    decoded = decode_sample(wanted, stream_sample.shard)
    cut = square(
        decoded.pixels,
        decoded.masks,
        [entity.box_xyxy_px for entity in entities],
        data.size,
        np.random.default_rng((*seed, CROP)) if data.crop == "random" else None,
    )
    candidates = [Candidate(*parts) for parts in zip(entities, cut.boxes, cut.masks, cut.seen, strict=True)]
    kept = []
    for candidate in placed_well(cut.pixels, candidates, filters, data.max_subjects, drops):
        entity = candidate.entity
        references = _references(entity, stream_sample, data.references.most) if other_image else ()
        if references or not other_image:
            box = box_of(candidate.mask)
            kept.append(ShardEntity(entity.noun, entity.caption_span, box, candidate.mask, references))
        else:
            drops["no_reference"] += 1
    return ShardScene(where, cut.pixels, record.caption, tuple(kept), {k: v for k, v in sorted(drops.items()) if v})


def _references(entity: Entity, stream_sample: EncodedSample, most: int) -> tuple[np.ndarray, ...]:
    """At most `most` of the entity's other pictures, drawn by the sample's seed; a picture without a pixel is none."""
    rng = np.random.default_rng((*stream_sample.seed, CHOICE, entity.id))
    names = [entity.references[i] for i in rng.permutation(len(entity.references))[:most]]
    pictures = [
        decode_reference(stream_sample.sample.references[name], f"{stream_sample.shard}: {name}") for name in names
    ]
    return tuple(picture for picture in pictures if (picture[..., 3] > 127).any())


def square(
    pixels: np.ndarray,
    masks: np.ndarray,
    boxes: Sequence[BoxPx],
    size: int,
    rng: np.random.Generator | None = None,
) -> Square:
    """The square along the longer side that keeps the boxes, at `size`.

    Args:
        pixels: (H, W, 3) uint8; masks: (N, H, W) bool; boxes: N of them.
        rng: draws among the squares that contain all boxes; None: the one nearest to the middle.
    """
    height, width = pixels.shape[:2]
    side, axis = min(height, width), 0 if width >= height else 1  # axis of the boxes' coordinates
    starts, ends = np.array([b[axis] for b in boxes]), np.array([b[axis + 2] for b in boxes])
    offset = crop_offset(starts, ends, side, max(height, width), rng)
    part = (slice(None), slice(offset, offset + side)) if axis == 0 else (slice(offset, offset + side), slice(None))
    method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    small = [
        cv2.resize(mask[part].astype(np.float32), (size, size), interpolation=cv2.INTER_AREA) >= 0.5 for mask in masks
    ]
    left, top = (offset, 0) if axis == 0 else (0, offset)
    moved = [
        tuple(min(max((v - o) * size / side, 0.0), float(size)) for v, o in zip(box, (left, top) * 2, strict=True))
        for box in boxes
    ]
    return Square(
        cv2.resize(np.ascontiguousarray(pixels[part]), (size, size), interpolation=method),
        small,
        moved,
        [float(share) for share in shown_shares(starts, ends, offset, side)],
    )


def crop_offset(starts: np.ndarray, ends: np.ndarray, side: int, longer: int, rng: np.random.Generator | None) -> int:
    """Where along the longer side the square begins, whole pixels.

    Among the offsets that contain all boxes: drawn by `rng`, or without it the one nearest to the middle. Where no
    square contains all: the one that shows most of them.

    Args:
        starts, ends: (N,) of the boxes along that side.
        side: of the square; longer: the picture's longer side.
    """
    low, high = 0, longer - side
    if len(starts):
        low, high = max(low, math.ceil(ends.max() - side)), min(high, math.floor(starts.min()))
    if low <= high and rng is not None:
        return int(rng.integers(low, high + 1))
    middle = (longer - side) / 2
    best, best_shown = 0, -1.0
    for offset in sorted({middle, 0.0, *starts, *(ends - side)}, key=lambda offset: (abs(offset - middle), offset)):
        whole = int(round(min(max(offset, 0), longer - side)))
        shown = float(shown_shares(starts, ends, whole, side).sum())
        if shown > best_shown + 1e-9:
            best, best_shown = whole, shown
    return best


def shown_shares(starts: np.ndarray, ends: np.ndarray, offset: int, side: int) -> np.ndarray:
    """Share of each box, along the longer side, that the square from `offset` shows: (N,)."""
    return (np.minimum(ends, offset + side) - np.maximum(starts, offset)).clip(min=0) / np.maximum(ends - starts, 1e-6)


def reduced_picture(jpeg: bytes, size: int) -> np.ndarray:
    """The middle square of a picture, (size, size, 3) uint8, decoded at the least scale that the format offers.

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(jpeg), formats=FORMATS) as image:
            image.draft("RGB", (size, size))
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # decoders raise whatever comes to them
        raise UserError(f"a picture cannot be decoded ({error})") from error
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    return cv2.resize(pixels[top : top + side, left : left + side], (size, size), interpolation=method)
