"""How well the hardware is used: floating-point operations of a step, counted once, against time and the GPU's peak.

Model FLOPs as in PaLM (arXiv 2204.02311, appendix B): what activation checkpointing computes a second time is left out,
so that the share of the peak (MFU) of two settings of the same model can be compared.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.errors import UserError
from train.gpus import find_gpu
from train.settings import EngineSettings


class _ModelFlops(FlopCounterMode):
    """Counts matrix products, convolutions and attention, forward and backward, a multiply-add as two."""

    def _count_flops(self, func_packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        # Recomputation is forward work inside the backward pass: alone there, it records gradients.
        if self.mod_tracker.is_bw and torch.is_grad_enabled():
            return out
        return super()._count_flops(func_packet, out, args, kwargs)


class StepFlops:
    """FLOPs of this process in one step, known once a step has been run inside `counting`."""

    def __init__(self) -> None:
        self.total: int | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around a whole step; costs something the first time and nothing afterwards. Compiled blocks run plainly."""
        if self.total is not None:
            yield
            return
        counter = _ModelFlops(display=False)
        with torch.compiler.set_stance("force_eager"), counter:
            yield
        self.total = counter.get_total_flops()


def peak_flops(device: torch.device, engine: EngineSettings) -> float | None:
    """FLOP/s that the maker states for this device and precision; None where it is not known."""
    if device.type != "cuda":
        return None
    try:
        gpu = find_gpu(torch.cuda.get_device_name(device))
    except UserError:
        return None
    return gpu.peak_flops(engine.precision, engine.tf32)


def peak_memory_gb(device: torch.device) -> float:
    """10^9 bytes: the most that tensors have taken on the GPU, on a CPU the most that this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
