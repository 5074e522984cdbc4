"""This process among those of a run, as torchrun, deepspeed and accelerate's launcher tell it in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import UserError


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


def check_same_data(position: Mapping[str, Any]) -> None:
    """Every process must read the same data: what one of them lacks would come twice or never, and nobody would know.

    Args:
        position: `Resumable.position(0)` before anything is resumed; called by all processes, after they have joined.
    Raises:
        UserError: on all processes, where one has other shards (a disk that is not mounted, a copy that is not
            finished) or other settings.
    """
    from accelerate.utils import gather_object  # here, for commands that only ask who is there

    everyone: list[dict[str, Any]] = gather_object([_flat(position)])
    first = everyone[0]
    for number, other in enumerate(everyone):
        if other != first:
            names = sorted(name for name in first.keys() | other.keys() if first.get(name) != other.get(name))
            raise UserError(
                f"{', '.join(names)}: differs on process {number} from that on process 0; give every machine the same "
                "settings and the same finished shards"
            )


def _flat(position: Mapping[str, Any]) -> dict[str, Any]:
    """A position with its sources by their keys in the settings."""
    rest = {f"data.{name}": value for name, value in position.items() if name != "sources"}
    return rest | {f"data.shards.{name}": value for name, value in position.get("sources", {}).items()}
