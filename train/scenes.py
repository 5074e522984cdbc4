"""Scenes as datasets: item i is a pure function of i, so that a position in the data is one number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data_pipeline.errors import UserError
from data_pipeline.toybox.world import ToyboxWorld
from train.settings import DataSettings


def make_world(data: DataSettings, *, split: str | None = None, seed: int | None = None) -> ToyboxWorld:
    """The world that `data` describes; another split or seed for validation.

    Raises:
        UserError: shards are named, which this task cannot use.
    """
    if data.shards is not None:
        raise UserError(f"data.shards={data.shards}: this task learns from toybox scenes; leave the key out")
    return ToyboxWorld(
        split or data.split,
        seed=data.seed if seed is None else seed,
        size=data.size,
        reference_size=data.size,
        min_subjects=data.min_subjects,
        max_subjects=data.max_subjects,
        references=data.references,
        procedural_share=data.procedural_share if split is None else 0.0,
    )


def as_tensor(picture: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float 0..1."""
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 255


class World(Protocol):
    """Where scenes come from: ToyboxWorld, ShardWorld."""

    def scene(self, index: int) -> Any:
        """Scene `index`: image, caption and entities."""
        ...


def open_world(data: DataSettings, *, split: str | None = None, need_references: bool = True) -> World:
    """The shards that `data` names, or the toybox.

    Raises:
        UserError: the shards cannot be used.
    """
    if data.shards is None:
        return make_world(data, split=split)
    from train.shard_scenes import ShardWorld

    return ShardWorld(
        data.shards,
        split or data.split,
        size=data.size,
        seed=data.seed,
        max_subjects=data.max_subjects,
        need_references=need_references,
    )


class SceneDataset(Dataset[Any]):
    """`transform(scene)` of scene i; with `distinct`, of scene i mod distinct, rendered once and kept."""

    def __init__(self, world: World, transform: Callable[[Any], Any], *, distinct: int = 0) -> None:
        self.world, self.transform, self.distinct = world, transform, distinct
        self.kept: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Any:
        if not self.distinct:
            return self.transform(self.world.scene(index))
        index %= self.distinct
        if index not in self.kept:
            self.kept[index] = self.transform(self.world.scene(index))
        return self.kept[index]
