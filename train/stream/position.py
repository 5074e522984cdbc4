"""A position in the data, as a checkpoint keeps it: how far, under which layout, of which sources, begun where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_pipeline.errors import UserError
from train.stream.layout import Layout
from train.stream.mixture import TOYBOX
from train.stream.shard_order import Begun


class Resumable(Protocol):
    """A data set that a run goes on with."""

    def position(self, passes: int) -> dict[str, Any]:
        """Where the data stand after so many forward passes of each process: plain JSON."""

    def resume(self, position: Mapping[str, Any], passes: int) -> None:
        """Go on from there, with the run's forward pass number `passes`; called before the loader is made."""


class _Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourcePosition(_Kept):
    """One source of shards."""

    contents: str
    samples: int = Field(ge=1)  # an epoch
    weight: float = Field(ge=0)
    epoch: int = Field(ge=0)  # where its order began, without `finished`
    finished: dict[int, list[tuple[int, int]]]
    seen: float = Field(ge=0)  # epochs that were read before it

    @property
    def begun(self) -> Begun:
        return Begun(self.epoch, self.finished)


class Position(_Kept):
    """The whole stream."""

    version: Literal[1] = 1
    passes: int = Field(ge=0)  # of the run, when this was kept
    begun_at: int  # pass at which this layout's arithmetic has its origin
    first_scene: int  # toybox scene of sample number 0 from there
    processes: int = Field(ge=1)
    workers: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    seed: int
    split: str
    order: Literal["epochs", "resampled"]
    shuffle_shards: int = Field(ge=1)
    toybox_weight: float = Field(ge=0)
    sources: dict[str, SourcePosition]

    @property
    def layout(self) -> Layout:
        return Layout(self.processes, self.workers, self.batch_size)

    @property
    def weights(self) -> dict[str, float]:
        return {TOYBOX: self.toybox_weight, **{name: source.weight for name, source in self.sources.items()}}


def read_position(kept: Mapping[str, Any]) -> Position:
    """Check what a checkpoint holds.

    Raises:
        UserError: it is no position of a stream.
    """
    try:
        position = Position.model_validate(dict(kept))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"the checkpoint's position in the data: {key}: {first['msg']}; "
            "it was not written by this kind of data: give the run another name, or remove its checkpoints"
        ) from error
    if position.passes < position.begun_at:
        raise UserError(
            f"the checkpoint's position in the data: passes={position.passes} lies before begun_at="
            f"{position.begun_at}; give the run another name, or remove its checkpoints"
        )
    return position
