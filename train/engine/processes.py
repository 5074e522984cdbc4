"""This process among those of a run, as torchrun, deepspeed and accelerate's launcher tell it in the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Processes:
    """Numbers count from 0."""

    index: int = 0
    count: int = 1
    local_index: int = 0  # on this machine
    local_count: int = 1

    @classmethod
    def from_environment(cls) -> Processes:
        """The only process, where no launcher started it."""
        count = int(os.environ.get("WORLD_SIZE", 1))
        index = int(os.environ.get("RANK", 0))
        local_count = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        return cls(index, count, int(os.environ.get("LOCAL_RANK", index)), local_count)

    @property
    def machine(self) -> int:
        """Number of this machine, where all run equally many processes."""
        return self.index // self.local_count

    @property
    def machines(self) -> int:
        return -(-self.count // self.local_count)
