"""How a run is spread over processes: plain data parallelism (`ddp`) or DeepSpeed's ZeRO, behind the same few calls.

Starts under `python` (one process), `torchrun` and `deepspeed --no_local_rank`. configs/deepspeed/STRATEGY.json holds
what is ZeRO's own; batch, accumulation, clipping and precision come from the settings. The loop of one step:

    for part in range(settings.accumulate):
        with accelerator.accumulate(wrapped):
            loss, metrics = wrapped(batch, draws, step)
            accelerator.backward(loss)
    norm, applied = finish_step(accelerator, wrapped, optimizer, settings.optimizer.max_grad_norm)

Source: ZeRO (arXiv 1910.02054), ZeRO-Offload (arXiv 2101.06840). Nothing here is compiled, so no compiler is needed.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from data_pipeline.errors import UserError
from train.settings import REPOSITORY, RunSettings

# The main process validates and writes alone while the others wait in the next step's first collective.
PATIENCE = timedelta(minutes=30)


class Step(NamedTuple):
    """What became of one optimiser step, the same on all processes."""

    norm: float  # of the gradients before clipping; inf or NaN where they were not finite
    applied: bool  # false: something was not finite, weights and optimiser are as before


def open_accelerator(settings: RunSettings) -> Accelerator:
    """Join the other processes, before anything is built on a device.

    Raises:
        UserError: DeepSpeed is missing, settings that do not go together, or processes that do not find each other.
    """
    strategy = settings.engine.strategy
    # One process may train several models one after another; accelerate keeps the settings of the first.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        # DeepSpeed is imported without being asked for too, by transformers when it saves, and would warn each time.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    launched = "WORLD_SIZE" in os.environ
    options: dict[str, Any] = {"gradient_accumulation_steps": settings.accumulate}
    handlers: list[Any] = []
    if strategy == "ddp":
        if settings.engine.precision == "fp16" and not on_gpu:
            raise UserError("engine.precision: fp16 needs a GPU; on a CPU set engine.precision=bf16 or no")
        # Some parameters get no gradient in a step whose conditions were all dropped. Gradients lie in the buckets of
        # the reductions, not beside them.
        handlers.append(DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True))
        options |= {"mixed_precision": settings.engine.precision, "cpu": not on_gpu}
    else:
        # DeepSpeed does the precision itself; with `cpu` accelerate would silently use plain data parallelism.
        options |= {"mixed_precision": "no", "deepspeed_plugin": _deepspeed_plugin(settings)}
        _stand_alone()
    if launched or strategy != "ddp":
        # Without a backend named, every process of a CPU run believes that it is alone.
        handlers.append(InitProcessGroupKwargs(backend=None if on_gpu else "gloo", timeout=PATIENCE))
    accelerator = Accelerator(kwargs_handlers=handlers, **options)
    wanted = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != wanted or is_zero(accelerator) != (strategy != "ddp"):
        raise UserError(
            f"engine.strategy: {strategy} was asked of {wanted} processes, {accelerator.distributed_type.value} on "
            f"{accelerator.num_processes} came up; start with python, torchrun or deepspeed --no_local_rank"
        )
    if is_zero(accelerator):
        from transformers.integrations import unset_hf_deepspeed_config

        # Else transformers' from_pretrained would partition, under ZeRO-3, the frozen models too.
        unset_hf_deepspeed_config()
    return accelerator


def prepare(
    accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap the one module that is trained and its optimiser; call the wrapped one, read the given one."""
    if is_zero(accelerator):
        # DeepSpeed lays all weights flat one after another and cannot start with weights in channels_last.
        module.to(memory_format=torch.contiguous_format)
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        if "offload_optimizer" in config["zero_optimization"]:
            for group in optimizer.param_groups:
                group["fused"] = True  # on the CPU, several times faster than the plain loop
        if "fp16" in config and config["fp16"]["enabled"]:
            # DeepSpeed holds fp16 weights; autocast gives each operation the precision that it needs.
            autocast = torch.autocast(accelerator.device.type, torch.float16)
            module.forward = autocast(module.forward)
    wrapped, prepared = accelerator.prepare(module, optimizer)
    return wrapped, prepared


def finish_step(
    accelerator: Accelerator, wrapped: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> Step:
    """Clip and apply the gradients that `accelerator.backward` has gathered, unless they are not finite.

    Every process has the norm of the averaged gradients, so all decide alike. A parameter without a gradient counts as
    one with zeros, as under ZeRO: so all parameters have seen the same number of optimiser steps.
    """
    if is_zero(accelerator):  # DeepSpeed has clipped, checked and stepped inside the last backward
        return Step(float(wrapped.get_global_grad_norm()), bool(wrapped.was_step_applied()))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = float(accelerator.clip_grad_norm_(parameters, max_grad_norm))
    finite = math.isfinite(norm)
    if finite or accelerator.scaler is not None:  # the scaler skips by itself, and lowers the scale
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(norm, finite and not getattr(optimizer, "step_was_skipped", False))


def is_zero(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


def zero_stage(accelerator: Accelerator) -> int:
    """0: ddp."""
    return int(accelerator.state.deepspeed_plugin.zero_stage) if is_zero(accelerator) else 0


def plain_module(accelerator: Accelerator, wrapped: nn.Module) -> AbstractContextManager[None]:
    """Inside, the module can be run by one process alone, as for validation and export; all processes must enter.

    Under ZeRO-3 all its parameters are whole on each device meanwhile, and what is written to them is forgotten.
    """
    return _unhooked(wrapped) if zero_stage(accelerator) == 3 else nullcontext()


@contextmanager
def _unhooked(engine: Any) -> Iterator[None]:
    from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation

    with unwrap_model_for_generation(engine):
        # It leaves those of the outermost module, which wait for the other processes.
        outermost = (engine.module._forward_pre_hooks, engine.module._forward_hooks)
        kept = [hooks.copy() for hooks in outermost]
        for hooks in outermost:
            hooks.clear()
        try:
            yield
        finally:
            for hooks, those in zip(outermost, kept, strict=True):
                hooks.update(those)


def _deepspeed_plugin(settings: RunSettings) -> DeepSpeedPlugin:
    """DeepSpeed's configuration: the file of the strategy, filled from the settings."""
    strategy = settings.engine.strategy
    if find_spec("deepspeed") is None:
        raise UserError(
            f"engine.strategy: {strategy} needs DeepSpeed, which is not installed; "
            "pip install 'subject-diffusion[train]', or set engine.strategy=ddp"
        )
    if settings.optimizer.kind != "adamw":
        raise UserError(
            f"optimizer.kind: {settings.optimizer.kind} works with engine.strategy ddp only, not {strategy}; "
            "set optimizer.kind=adamw"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    # On a CPU DeepSpeed would compile shared-memory collectives for two minutes; only its inference uses them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if settings.engine.precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError("engine.precision: this device has no fp16; set engine.precision=bf16 or no")
    config = json.loads((REPOSITORY / "configs" / "deepspeed" / f"{strategy}.json").read_text())
    config |= {
        "train_micro_batch_size_per_gpu": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulate,
        "gradient_clipping": settings.optimizer.max_grad_norm,
        "fp16": {"enabled": settings.engine.precision == "fp16"},  # fp16 weights, float32 copy in the optimiser
        "bf16": {"enabled": False},  # weights stay float32, as under ddp: a step is smaller than bf16 resolves
    }
    if settings.engine.precision == "bf16":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    return DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)


def _stand_alone() -> None:
    """Let DeepSpeed, which wants a launcher, run under plain `python` as the only process."""
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})  # 0: any free port
