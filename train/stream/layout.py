"""Who reads sample n: arithmetic from the sample's number to a process, one of its workers and a place in its order.

A slot is one worker of one process. torch's DataLoader hands its batches to its workers in turn, so with a batch
sampler all passes of one slot go to the same worker, which can read its shards one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How the samples of a forward pass are spread: pass p of process r takes n = (p·processes + r)·batch_size + j."""

    processes: int = 1
    workers: int = 0  # of the loader in each process; 0: the process itself, which counts as one
    batch_size: int = 1  # samples a process and forward pass

    def __post_init__(self) -> None:
        if self.processes < 1 or self.workers < 0 or self.batch_size < 1:
            raise UserError(f"{self}: expected at least one process, no or some workers, at least one sample a batch")

    @property
    def lanes(self) -> int:
        """Slots of one process."""
        return max(self.workers, 1)

    @property
    def slots(self) -> int:
        return self.processes * self.lanes

    @property
    def samples_a_pass(self) -> int:
        return self.processes * self.batch_size

    def place(self, number: int) -> tuple[int, int]:
        """Slot, and position in the slot, of sample `number` counted from the first pass."""
        batch, within = divmod(number, self.batch_size)
        forward_pass, process = divmod(batch, self.processes)
        turn, lane = divmod(forward_pass, self.lanes)
        return process * self.lanes + lane, turn * self.batch_size + within

    def number(self, slot: int, position: int) -> int:
        """The inverse of `place`."""
        process, lane = divmod(slot, self.lanes)
        turn, within = divmod(position, self.batch_size)
        return ((turn * self.lanes + lane) * self.processes + process) * self.batch_size + within

    def taken(self, slot: int, passes: int) -> int:
        """Positions of a slot that the first `passes` forward passes take."""
        return max(0, -(-(passes - slot % self.lanes) // self.lanes)) * self.batch_size
