"""Running average of the trained parameters (EMA), float32: what is validated, saved and exported.

It stands after `prepare` in the loop and averages the float32 weights that the optimiser moves: the parameters
themselves, or under DeepSpeed the float32 masters behind low-precision ones. There every process averages its own part,
so a step costs no communication; parts are put together when they are read. The arithmetic is diffusers' `EMAModel`:
w' += (1 - decay)(w - w'), with decay min(decay, (1 + n)/(10 + n)) at update n and a copy at the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from train.settings import EmaSettings


@dataclass(frozen=True)
class _Part:
    """What this process holds of one parameter's float32 weights."""

    name: str
    start: int  # in the flattened parameter
    weights: nn.Parameter  # the storage that the optimiser moves; (n,), or the whole parameter

    def of(self, full: Tensor) -> Tensor:
        """This part of a full tensor, shaped like `weights`."""
        return full.flatten()[self.start : self.start + self.weights.numel()].view(self.weights.shape)


class AveragedWeights:
    """The average of one module's trained parameters. All of its methods are called by all processes."""

    def __init__(self, module: nn.Module, settings: EmaSettings) -> None:
        """
        Args:
            module: the bare module, after `accelerator.prepare`. Its trained parameters are float32, or low-precision
                copies of DeepSpeed's masters.
            settings: with `decay` 0 nothing is kept: the average is the weights themselves.
        """
        self.module, self.settings = module, settings
        self._trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._parts = [part for name, parameter in self._trained.items() for part in _own_parts(name, parameter)]
        self._split = any(_is_split(parameter) for parameter in self._trained.values())
        self._in_use = False  # before `start` the average is the weights
        if not settings.decay:
            return
        weights = [part.weights for part in self._parts]
        # Few large kernels suit a GPU; on a CPU, one tensor at a time stays in its cache and needs no copy of them all.
        foreach = not settings.offload and any(each.device.type == "cuda" for each in weights)
        # An update every k steps weighs the past as k updates would.
        self._ema = EMAModel(weights, decay=settings.decay**settings.every, foreach=foreach)
        if settings.offload:
            self._ema.to("cpu")
        self._staging = [
            nn.Parameter(torch.empty_like(part.weights, device="cpu", pin_memory=True))
            for part in self._parts
            if settings.offload and part.weights.device.type == "cuda"
        ]

    def update(self, step: int) -> None:
        """Take in the weights after `step` (0-based); the number of updates follows from it, so nothing is stored."""
        after_start = step + 1 - self.settings.start
        self._in_use = bool(self.settings.decay) and after_start >= self.settings.every
        if not self._in_use or after_start % self.settings.every:
            return
        self._ema.optimization_step = after_start // self.settings.every - 1
        self._ema.step(self._within_reach())

    def state_tensors(self) -> dict[str, Tensor]:
        """The average by parameter name: on the main process all of it, float32; elsewhere nothing under DeepSpeed."""
        averages = self._averages()
        if not self._split:
            return {part.name: value for part, value in zip(self._parts, averages, strict=True)}
        state = {}
        for name, full in self._gathered(averages):
            if torch.distributed.get_rank() == 0:
                state[name] = full.cpu()
        return state

    def load_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave on any number of processes, in full on each of them."""
        if not self.settings.decay:
            return
        for part, shadow in zip(self._parts, self._ema.shadow_params, strict=True):
            shadow.copy_(part.of(state[part.name]))
        self._in_use = True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the module computes with the average, in evaluation mode; afterwards it is as before, to the bit.

        Entered by all processes.
        """
        training = self.module.training
        if self._in_use:
            self._put_in(self._averages())
        self.module.eval()
        try:
            yield
        finally:
            if self._in_use:
                self._put_back()
            self.module.train(training)

    def _averages(self) -> list[Tensor]:
        return self._ema.shadow_params if self._in_use else [part.weights.detach() for part in self._parts]

    def _within_reach(self) -> Sequence[nn.Parameter]:
        """The weights, on the device where the average lies."""
        if not self._staging:
            return [part.weights for part in self._parts]
        with torch.no_grad():
            for staged, part in zip(self._staging, self._parts, strict=True):
                staged.copy_(part.weights, non_blocking=True)
        torch.cuda.synchronize()
        return self._staging

    def _put_in(self, averages: Sequence[Tensor]) -> None:
        if self._split:
            self._write(averages)
        else:
            self._ema.store(self._trained.values())
            self._ema.copy_to(self._trained.values())

    def _put_back(self) -> None:
        if self._split:
            self._write([part.weights.detach() for part in self._parts])  # what DeepSpeed itself does after each step
        else:
            self._ema.restore(self._trained.values())

    @torch.no_grad()
    def _write(self, parts: Sequence[Tensor]) -> None:
        """Parameters := full tensors put together from float32 parts, in the parameters' own precision."""
        for name, full in self._gathered(parts):
            with _writable(self._trained[name]) as parameter:
                parameter.data.copy_(full)

    def _gathered(self, parts: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Full float32 tensors, one at a time, in the same order on all processes."""
        own: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in self._trained}
        for part, value in zip(self._parts, parts, strict=True):
            own[part.name].append((part.start, value))
        for name, parameter in self._trained.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            full = torch.zeros(shape.numel(), device=parameter.device)
            for start, value in own[name]:
                full[start : start + value.numel()] = value.flatten()
            torch.distributed.all_reduce(full)
            yield name, full.view(shape)


def _is_split(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _own_parts(name: str, parameter: nn.Parameter) -> list[_Part]:
    """The parameter itself; under DeepSpeed what this process holds of its float32 master, which may be nothing."""
    if hasattr(parameter, "ds_id"):  # ZeRO-3: equal shares, the last ones padded
        from deepspeed.utils import safe_get_local_fp32_param

        share = safe_get_local_fp32_param(parameter).detach()
        start = share.numel() * torch.distributed.get_rank()
        size = min(share.numel(), parameter.ds_numel - start)
        return [_Part(name, start, nn.Parameter(share[:size]))] if size > 0 else []
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: a stretch of all parameters laid end to end
        mapping = parameter._hp_mapping
        if mapping is None:
            return []
        return [_Part(name, mapping.lp_fragment_address.start, nn.Parameter(mapping.get_hp_fragment().detach()))]
    return [_Part(name, 0, parameter)]


@contextmanager
def _writable(parameter: nn.Parameter) -> Iterator[nn.Parameter]:
    """The parameter, whole; under ZeRO-3 each process keeps its share of what the main process has written."""
    if not hasattr(parameter, "ds_id"):
        yield parameter
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        yield parameter
