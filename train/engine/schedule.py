"""Learning rate over the steps, as a pure function: linear warm-up, then constant or a decay."""

from __future__ import annotations

import math

from train.settings import OptimizerSettings


def learning_rate_factor(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Share of the full learning rate at `step` (0-based) of `steps`, in 0..1."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    if settings.decay == "constant":
        return 1.0
    progress = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    left = 1.0 - progress if settings.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.decay_to + (1 - settings.decay_to) * left
