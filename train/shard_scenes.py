"""Shards of the dataset builder as scenes: a square with its caption, boxes, masks and references, at training size.

Scene i is a function of i: pass i // N over the N samples, each pass in an order of its own. Every 32nd sample is kept
apart for validation.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.record import BoxPx, Entity
from data_pipeline.shards.reader import DecodedSample, decode_sample, list_shards, read_stats
from data_pipeline.shards.shard_index import ShardIndex
from data_pipeline.toybox.world import box_of

HELD_EVERY = 32  # one in so many samples is for validation
SEEN_SHARE = 0.6  # of an entity's box that the square must show for it to stay a subject
LOOKED_AT = 200  # samples that are searched for references before training starts


@dataclass(frozen=True)
class ShardEntity:
    """A subject of a scene."""

    noun: str
    span: tuple[int, int] | None  # characters in the caption
    box_xyxy_px: BoxPx
    mask: np.ndarray  # (size, size) bool
    references: tuple[np.ndarray, ...]  # each (h, w, 4) uint8 RGBA
    reference_backgrounds: tuple[None, ...]


@dataclass(frozen=True)
class ShardScene:
    """A square of a sample's picture."""

    index: int
    image: np.ndarray  # (size, size, 3) uint8
    caption: str
    entities: tuple[ShardEntity, ...]


class ShardWorld:
    """Scenes of one part, train or val, of a folder of shards; `contents` are the hashes of its tars."""

    def __init__(
        self, folder: str, split: str, *, size: int, seed: int, max_subjects: int, need_references: bool
    ) -> None:
        """
        Args:
            size: side of the scenes, pixels.
            max_subjects: the largest entities stay.
            need_references: leave out entities of which the shards hold no other picture.
        Raises:
            UserError: too few samples, or no references where they are needed.
        """
        shards = list_shards(folder)
        self.index = ShardIndex(shards)
        self.contents = [read_stats(shard).files[f"{shard.name}.tar"].sha256 for shard in shards]
        self.size, self.seed, self.max_subjects, self.need_references = size, seed, max_subjects, need_references
        if len(self.index) < HELD_EVERY:
            raise UserError(
                f"data.shards={folder}: {len(self.index)} samples in finished shards; "
                f"training needs at least {HELD_EVERY}"
            )
        held = np.arange(len(self.index)) % HELD_EVERY == HELD_EVERY - 1
        self.items = np.flatnonzero(held if split == "val" else ~held)
        if need_references and not any(
            entity.references for item in self.items[:LOOKED_AT] for entity in self.index[int(item)].record.entities
        ):
            raise UserError(
                f"data.shards={folder}: no entity has pictures of its own; set diffusion.reference=same_image, "
                "or build shards with references"
            )

    def scene(self, index: int) -> ShardScene:
        """Scene `index`, from 0."""
        turn, position = divmod(index, len(self.items))
        order = np.random.default_rng((self.seed, turn)).permutation(len(self.items))
        sample = self.index[int(self.items[order[position]])]
        decoded = decode_sample(sample)
        pixels, masks = square(
            decoded.pixels, decoded.masks, [e.box_xyxy_px for e in sample.record.entities], self.size
        )
        entities = [
            self._entity(entity, mask, decoded)
            for entity, mask in zip(sample.record.entities, masks, strict=True)
            if mask is not None and (entity.references or not self.need_references)
        ]
        entities.sort(key=lambda entity: -int(entity.mask.sum()))
        return ShardScene(index, pixels, sample.record.caption, tuple(entities[: self.max_subjects]))

    def _entity(self, entity: Entity, mask: np.ndarray, decoded: DecodedSample) -> ShardEntity:
        references = tuple(decoded.references[name] for name in entity.references)
        backgrounds = (None,) * len(references)
        return ShardEntity(entity.noun, entity.caption_span, box_of(mask), mask, references, backgrounds)


def square(
    pixels: np.ndarray, masks: np.ndarray, boxes: list[BoxPx], size: int
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """The square along the longer side that shows most of the boxes, at `size`.

    Args:
        pixels: (H, W, 3) uint8; masks: (N, H, W) bool; boxes: N of them.
    Returns:
        (size, size, 3) uint8, and each mask as (size, size) bool, None where too little of its box is left.
    """
    height, width = pixels.shape[:2]
    side, longer = min(height, width), max(height, width)
    axis = 0 if width >= height else 1  # of the boxes' coordinates
    starts, ends = np.array([b[axis] for b in boxes]), np.array([b[axis + 2] for b in boxes])
    middle = (longer - side) / 2
    offsets = sorted({middle, 0.0, *starts, *(ends - side)}, key=lambda offset: (abs(offset - middle), offset))
    best, best_seen = 0, np.zeros(len(boxes))
    best_total = -1.0
    for offset in offsets:
        whole = int(round(min(max(offset, 0), longer - side)))
        seen = (np.minimum(ends, whole + side) - np.maximum(starts, whole)).clip(min=0) / np.maximum(
            ends - starts, 1e-6
        )
        if seen.sum() > best_total + 1e-9:
            best, best_seen, best_total = whole, seen, float(seen.sum())
    part = (slice(None), slice(best, best + side)) if axis == 0 else (slice(best, best + side), slice(None))
    method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    picture = cv2.resize(np.ascontiguousarray(pixels[part]), (size, size), interpolation=method)
    kept: list[np.ndarray | None] = []
    for mask, seen_share in zip(masks, best_seen, strict=True):
        small = cv2.resize(mask[part].astype(np.float32), (size, size), interpolation=cv2.INTER_AREA) >= 0.5
        kept.append(small if seen_share >= SEEN_SHARE and small.any() else None)
    return picture, kept
