"""A scene as the frozen models take it: the picture, its references in their frames, texts, boxes and small masks.

Runs in the loading processes, on scenes of the toybox and of shards alike. A prepared scene is a function of the scene,
the settings and the seed; everything in it is small enough to be handed from process to process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data_pipeline.toybox.world import ToyboxEntity, ToyboxScene
from model.reference import prepare_reference
from train.data.reference_augmentation import BackgroundSource, augment
from train.data.shard_scenes import ShardEntity, ShardScene
from train.settings import DataSettings

Scene = ToyboxScene | ShardScene
Entity = ToyboxEntity | ShardEntity

MASK_SIDES = (16, 64)  # least and most pixels of a stored mask's side; between them an eighth of the picture's
REFERENCE = 2  # purpose of random numbers, after the sample's seed


@dataclass(frozen=True)
class PreparedScene:
    """A scene with S subjects and R references of them, R in all."""

    key: str
    picture: Tensor  # (3, H, H) uint8
    caption: str
    nouns: tuple[str, ...]
    spans: tuple[tuple[int, int] | None, ...]  # characters of the caption; None: not named there
    boxes: Tensor  # (S, 4) xyxy fractions
    masks: Tensor  # (S, M, M) half, 0..1: share of each cell that is the entity
    references: Tensor  # (R, 3, h, h) uint8, of all entities in order
    reference_counts: tuple[int, ...]  # references of each entity, sums to R
    drops: Mapping[str, int] = field(default_factory=dict)  # entities left out, by reason


class ScenePreparation:
    """What `data` says of references, for an image tower of one size."""

    def __init__(self, data: DataSettings, image_size: int) -> None:
        self.settings, self.max_subjects, self.image_size = data.references, data.max_subjects, image_size

    def __call__(self, scene: Scene, key: str, seed: tuple[int, ...], behind: BackgroundSource) -> PreparedScene:
        """
        Args:
            seed: of the sample; each reference draws from (seed, subject, reference).
            behind: where backgrounds come from, for references that bring none of their own.
        """
        entities = largest(scene.entities, self.max_subjects)
        drops = dict(scene.drops) if isinstance(scene, ShardScene) else {}
        if len(entities) < len(scene.entities):
            drops["too_many"] = drops.get("too_many", 0) + len(scene.entities) - len(entities)
        references = [self._references(scene, e, (*seed, REFERENCE, i), behind) for i, e in enumerate(entities)]
        frames = [frame for of_entity in references for frame in of_entity]
        empty = torch.zeros(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
        size = scene.image.shape[0]
        return PreparedScene(
            key=key,
            picture=torch.from_numpy(np.ascontiguousarray(scene.image.transpose(2, 0, 1))),
            caption=scene.caption,
            nouns=tuple(e.noun for e in entities),
            spans=tuple(e.span for e in entities),
            boxes=torch.tensor([e.box_xyxy_px for e in entities], dtype=torch.float32).reshape(-1, 4) / size,
            masks=small_masks([e.mask for e in entities], size),
            references=torch.stack(frames) if frames else empty,
            reference_counts=tuple(len(of_entity) for of_entity in references),
            drops=drops,
        )

    def _references(
        self, scene: Scene, entity: Entity, seed: tuple[int, ...], behind: BackgroundSource
    ) -> list[Tensor]:
        """Frames of one subject's references, each (3, h, h) uint8."""
        settings = self.settings
        cutouts: tuple[np.ndarray, ...] = entity.references[: settings.most]
        if settings.source == "same_image":
            cutouts = (same_image_reference(scene, entity),)
        frames = []
        for number, cutout in enumerate(cutouts):
            rng = np.random.default_rng((*seed, number))
            replaced = rng.random() < settings.background
            view = augment(cutout, settings, self.image_size, rng)
            if isinstance(entity, ToyboxEntity) and settings.source == "other_image":
                background = entity.reference_backgrounds[number]  # rendered with it
            else:
                background = behind(rng) if replaced else None
            frame = prepare_reference(view, self.image_size, background)
            frames.append((frame * 255).round().to(torch.uint8))
        return frames


def largest(entities: tuple[Entity, ...], most: int) -> tuple[Entity, ...]:
    """At most `most` entities, those with the largest masks, in their order."""
    areas = [int(entity.mask.sum()) for entity in entities]
    chosen = sorted(range(len(entities)), key=lambda index: -areas[index])[:most]
    return tuple(entities[index] for index in sorted(chosen))


def same_image_reference(scene: Scene, entity: Entity) -> np.ndarray:
    """The entity cut out of the target picture itself: (h, w, 4) RGBA uint8."""
    x0, y0, x1, y1 = (round(value) for value in entity.box_xyxy_px)
    rgba = np.dstack([scene.image, entity.mask.astype(np.uint8) * 255])
    return rgba[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]


def mask_side(size: int) -> int:
    """Side of the stored masks of a picture of `size` pixels."""
    return min(max(size // 8, MASK_SIDES[0]), MASK_SIDES[1])


def small_masks(masks: list[np.ndarray], size: int) -> Tensor:
    """Masks (size, size) bool -> (S, M, M) half."""
    side = mask_side(size)
    if not masks:
        return torch.zeros(0, side, side, dtype=torch.half)
    whole = torch.from_numpy(np.stack(masks).astype(np.float32))[:, None]  # (S, 1, size, size)
    return torch.nn.functional.adaptive_avg_pool2d(whole, side)[:, 0].half()
