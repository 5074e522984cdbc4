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

    module: nn.Module  # all that is trained; forward(batch, generator, step) -> (loss, {metric: value})
    dataset: Dataset[Any]  # item i is a pure function of i
    loader_workers: int  # processes that load items; 0 where they are in memory

    def __init__(self, settings: TrainSettings, device: torch.device) -> None: ...

    def collate(self, items: list[Any]) -> Any:
        """Items of one batch -> what `module` takes."""

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
