"""Random numbers of a training step. Those of a sample come from the run's seed and the sample's number alone.

So a step draws the same whether one process takes all its samples or eight share them, and a resumed run draws what the
undisturbed one would have.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class SampleDraws:
    """Draws for the B samples of one forward pass, on the CPU."""

    def __init__(self, seed: int, step: int, numbers: Sequence[int]) -> None:
        """
        Args:
            seed: of the run.
            step: optimiser step, for what all samples of a step share.
            numbers: of the B samples, counted through all processes and steps.
        """
        self.shared = _generator(seed, 0, step)  # the same for all processes of a step
        self._own = [_generator(seed, 1, number) for number in numbers]

    def __len__(self) -> int:
        return len(self._own)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32, standard normal."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self._own])

    def uniform(self) -> Tensor:
        """(B,) float32 in [0, 1)."""
        return torch.cat([torch.rand(1, generator=generator) for generator in self._own])

    def integers(self, high: int) -> Tensor:
        """(B,) int64 in [0, high)."""
        return torch.cat([torch.randint(0, high, (1,), generator=generator) for generator in self._own])


def _generator(*key: int) -> torch.Generator:
    """A generator whose seed is a hash of `key`: neighbouring keys must not give neighbouring seeds."""
    state = np.random.SeedSequence([part % 2**64 for part in key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)
