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
    """The world that `data.toybox` describes, for tasks that learn from it alone; other split or seed for validation.

    Raises:
        UserError: shards are named, which such a task cannot use.
    """
    if data.shards:
        raise UserError(f"data.shards={', '.join(data.shards)}: this task learns from toybox scenes; leave the key out")
    return toybox_world(data, split=split, seed=seed)


def toybox_world(data: DataSettings, *, split: str | None = None, seed: int | None = None) -> ToyboxWorld:
    """The world that `data.toybox` describes; another split, without procedural subjects, for validation."""
    toybox = data.toybox
    return ToyboxWorld(
        split or toybox.split,
        seed=data.seed if seed is None else seed,
        size=data.size,
        reference_size=data.size,
        min_subjects=toybox.min_subjects,
        max_subjects=toybox.max_subjects,
        references=toybox.references,
        procedural_share=toybox.procedural_share if split is None else 0.0,
        group_share=toybox.group_share,
        colour_share=toybox.colour_share,
    )


def as_tensor(picture: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float 0..1."""
    return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1).float() / 255


class World(Protocol):
    """Where scenes come from: ToyboxWorld."""

    def scene(self, index: int) -> Any:
        """Scene `index`: image, caption and entities."""
        ...


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
