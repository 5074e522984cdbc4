"""What the tasks that learn from toybox scenes alone have in common: batches are tensors that only have to be moved."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import send_to_device

from train.settings import TrainSettings


class ToyboxTask:
    """Base of such a task; see `train.tasks.Task`."""

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        self.device, self.loader_workers = device, settings.data.workers

    def batch(self, collated: Any) -> Any:
        return send_to_device(collated, self.device)

    def keys(self, collated: Any) -> list[str]:
        return []

    def counts(self, collated: Any) -> dict[str, int]:
        return {}
