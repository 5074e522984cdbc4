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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from data_pipeline.errors import UserError
from train.engine.gpus import find_gpu
from train.settings import EngineSettings


class _ModelFlops(TorchDispatchMode):
    """Counts matrix products, convolutions and attention, forward and backward, a multiply-add as two.

    torch's FlopCounterMode hooks into the graph for its table by module, and with that changes the order in which
    gradients are summed: a run that resumes, and counts at another step, would differ in the last bits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func.overloadpacket)
        # Recomputation is forward work inside the backward pass: alone there, it records gradients.
        recomputed = torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
        if formula is not None and not recomputed:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


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
        counter = _ModelFlops()
        with torch.compiler.set_stance("force_eager"), counter:
            yield
        self.total = counter.total


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
