"""All that resumes of a run, in one object, and its tensors whole and by name whatever the strategy holds in pieces.

`weights()` and `optimizer_tensors()` hand out one gathered tensor at a time; `set_weight` and `set_optimizer_state`
put one back, so that what ZeRO-3 wrote on eight processes goes on as `ddp` on one. All processes call them together.
ZeRO (arXiv 1910.02054) keeps one flat float32 tensor, and Adam's two beside it, for each group of parameters and
process; DeepSpeed's `safe_get_full_…` functions find a parameter's place in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from train.engine.strategies import is_zero, zero_stage


class Average(Protocol):
    """The running average of the trained parameters, `averaging.AveragedWeights`. All processes call both."""

    def state_tensors(self) -> dict[str, Tensor]:
        """Float32 averages by the parameters' names, on the main process."""

    def load_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_tensors` gave, in full on each process."""


@dataclass
class RunState:
    """One run between two steps."""

    module: nn.Module  # as the task built it
    wrapped: nn.Module  # as `strategies.prepare` returned it
    optimizer: torch.optim.Optimizer  # likewise
    ema: Average
    step: int = 0  # optimiser steps done, skipped ones included
    skipped: int = 0  # of them not applied
    position: dict[str, Any] = field(default_factory=dict)  # in the data, as the data set tells it; JSON


class WholeTensors:
    """The weights and the optimiser's state of `state` as whole tensors by name."""

    def __init__(self, state: RunState, accelerator: Accelerator) -> None:
        self.accelerator, self.stage = accelerator, zero_stage(accelerator)
        self.trained = {name: p for name, p in state.module.named_parameters() if p.requires_grad}
        kept = state.module.state_dict(keep_vars=True)
        self.buffers = {name: buffer for name, buffer in state.module.named_buffers() if name in kept}
        self.zero: Any = state.wrapped.optimizer if is_zero(accelerator) else None
        # torch's own optimiser, inside DeepSpeed's or accelerate's wrapper.
        self.inner: torch.optim.Optimizer = (self.zero or state.optimizer).optimizer
        self.flat: dict[int, Tensor] = {}  # ZeRO: id of a parameter -> the flat tensor that holds this process's part
        if self.zero is not None:
            groups = self.zero.fp16_groups if self.stage == 3 else self.zero.bit16_groups
            flats = self.zero.fp32_partitioned_groups_flat if self.stage == 3 else (
                self.zero.single_partition_of_fp32_groups
            )  # fmt: skip
            self.flat = {id(p): flat for group, flat in zip(groups, flats, strict=True) for p in group}
        self.group_of = {id(t): group for group in self.inner.param_groups for t in group["params"]}

    def shapes(self) -> dict[str, list[int]]:
        """Of all weights that a checkpoint holds."""
        trained = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self.trained.items()}
        return trained | {name: list(buffer.shape) for name, buffer in self.buffers.items()}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Trained parameters in float32, then buffers."""
        for name, parameter in self.trained.items():
            if self.zero is None:
                yield name, parameter.detach().float()
            else:
                from deepspeed.utils import safe_get_full_fp32_param

                yield name, safe_get_full_fp32_param(parameter)
        yield from self.buffers.items()

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """NAME.KEY: `exp_avg`, `exp_avg_sq` and `step` for Adam; nothing before the first applied step."""
        self._tie_pieces()
        for name, parameter in self.trained.items():
            for key, value in self.inner.state.get(self.flat.get(id(parameter), parameter), {}).items():
                if self.zero is None or not torch.is_tensor(value) or value.dim() == 0:
                    yield f"{name}.{key}", torch.as_tensor(value)
                else:
                    from deepspeed.utils import safe_get_full_optimizer_state

                    yield f"{name}.{key}", safe_get_full_optimizer_state(parameter, key)

    def optimizer_keys(self) -> list[str]:
        """What the optimiser keeps for a parameter; nothing before the first applied step."""
        return sorted(next(iter(self.inner.state.values()), {}))

    @torch.no_grad()
    def set_weight(self, name: str, value: Tensor) -> None:
        """Put one whole tensor in its place; every process gives the same."""
        if name in self.buffers:
            self.buffers[name].copy_(value)
            return
        parameter = self.trained[name]
        if self.stage == 3:
            from deepspeed.runtime.zero import GatheredParameters
            from deepspeed.utils import safe_set_local_fp32_param

            with GatheredParameters([parameter], modifier_rank=0):
                if self.accelerator.is_main_process:
                    parameter.copy_(value)
            safe_set_local_fp32_param(parameter, self._slice(parameter, value))
            return
        parameter.copy_(value)
        if self.zero is not None:
            from deepspeed.utils import safe_set_full_fp32_param

            safe_set_full_fp32_param(parameter, value)

    @torch.no_grad()
    def set_optimizer_state(self, name: str, values: dict[str, Tensor]) -> None:
        """Put the state of one parameter in its place; every process gives the same."""
        parameter = self.trained[name]
        held = self.flat.get(id(parameter), parameter)
        if self.zero is not None:
            self._start_flat_state([key for key, value in values.items() if value.dim()])
        for key, value in values.items():
            if value.dim() == 0:
                self.inner.state[held][key] = self._scalar(value, held)
            elif self.zero is None:
                # Adam's averages lie in memory as the parameter does; tables of 8-bit Adam have shapes of their own.
                like = parameter if value.shape == parameter.shape else value
                kept = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
                self.inner.state[held][key] = kept.copy_(value)
            elif self.stage == 3:
                from deepspeed.utils import safe_set_local_optimizer_state

                safe_set_local_optimizer_state(parameter, self._slice(parameter, value), key)
            else:
                from deepspeed.utils import safe_set_full_optimizer_state

                safe_set_full_optimizer_state(parameter, value, key)

    def _start_flat_state(self, keys: list[str]) -> None:
        """ZeRO: what the first step would make, so that pieces can be put into it before that."""
        if self.inner.state:
            return
        for flat in self.flat.values():
            for key in keys:
                self.inner.state[flat].setdefault(key, torch.zeros_like(flat))
        self._tie_pieces()

    def _tie_pieces(self) -> None:
        """ZeRO-1 and 2: let each parameter know its place in the flat state.

        DeepSpeed does so in the first step, but before the optimiser has any state for the second and later groups.
        """
        if self.zero is not None and self.stage < 3 and self.inner.state:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def loss_scale(self) -> dict[str, float] | None:
        """Of fp16: the scale, and the steps since it changed or a gradient was infinite."""
        if self.zero is not None and getattr(self.zero.loss_scaler, "dynamic", False):
            scaler = self.zero.loss_scaler
            steps = scaler.cur_iter - scaler.last_overflow_iter - 1
            return {"scale": scaler.cur_scale, "steps": steps, "hysteresis": scaler.cur_hysteresis}
        if self.zero is None and self.accelerator.scaler is not None:
            saved = self.accelerator.scaler.state_dict()
            return {"scale": saved["scale"], "steps": saved["_growth_tracker"]}
        return None

    def set_loss_scale(self, saved: dict[str, float] | None) -> None:
        """A scale that was written under another precision, or none, changes nothing."""
        if saved is None:
            return
        if self.zero is not None and getattr(self.zero.loss_scaler, "dynamic", False):
            scaler = self.zero.loss_scaler
            scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = saved["scale"], int(saved["steps"]), -1
            scaler.cur_hysteresis = int(saved.get("hysteresis", scaler.cur_hysteresis))
        elif self.zero is None and self.accelerator.scaler is not None:
            scaler = self.accelerator.scaler
            scaler.load_state_dict(
                scaler.state_dict() | {"scale": saved["scale"], "_growth_tracker": int(saved["steps"])}
            )

    def _scalar(self, value: Tensor, held: Tensor) -> Any:
        if not value.dtype.is_floating_point:
            return int(value)
        group = self.group_of.get(id(held), self.inner.param_groups[0])
        on_device = group.get("fused") or group.get("capturable")
        return value.clone().to(held.device if on_device else "cpu")

    def _slice(self, parameter: Any, value: Tensor) -> Tensor:
        """ZeRO-3: this process's part of `value`, padded so that all parts are of one size."""
        size = parameter.ds_tensor.ds_numel
        start = self.accelerator.process_index * size
        part = value.flatten()[start : start + size]
        return torch.nn.functional.pad(part, (0, size - part.numel()))
