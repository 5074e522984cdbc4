"""A task is what differs between the models: module and loss, data, validation picture, export. One file each."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import Dataset

from train.settings import TrainSettings


class Task(Protocol):
    """One model to train; `train.loop` knows nothing else of it."""

    # All that is trained, and nothing else that is large: forward(batch, draws: SampleDraws, step) -> (loss, metrics).
    # A metric is a scalar tensor; NaN where this batch says nothing about it.
    module: nn.Module
    dataset: Dataset[Any]  # item n is a pure function of n
    loader_workers: int  # processes that load items; 0 where they are in memory

    def __init__(self, settings: TrainSettings, device: torch.device) -> None: ...

    def collate(self, items: list[Any]) -> Any:
        """Items of one batch -> tensors on the CPU; runs where the items are loaded."""

    def batch(self, collated: Any) -> Any:
        """What `module` takes: moved to the device and, where frozen models have a part in it, seen by them."""

    def keys(self, collated: Any) -> list[str]:
        """What a person finds the samples by (shard and key); empty where their numbers say it all."""

    def counts(self, collated: Any) -> dict[str, int]:
        """Things in the batch that are worth a line in the log, such as entities; the same names at every pass."""

    def validate(self, picture: Path) -> dict[str, float]:
        """Write a PNG that shows how good the module is now, and return its figures on unseen subjects."""

    def export(self, folder: Path) -> None:
        """Save the module in the real format that the next task and the pipeline read."""


TASKS = {
    "vae": "VaeTask",
    "clip": "ClipTask",
    "base": "BaseTask",
    "subject": "SubjectTask",
    "judge_identity": "IdentityJudgeTask",
    "judge_segment": "SegmentJudgeTask",
    "region_clip": "RegionClipTask",
}


def build_task(settings: TrainSettings, device: torch.device) -> Task:
    """Import and build the task that `settings.task` names."""
    return getattr(import_module(f"train.tasks.{settings.task}"), TASKS[settings.task])(settings, device)
