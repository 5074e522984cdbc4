"""Small runs under any strategy, started by the tests in processes of their own: the trainer's calls, nothing else.

torchrun --nproc_per_node 2 tests/train/engine/strategy_run.py '[{"folder": "…", "strategy": "zero2", "steps": 3}]'
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.settings import load_settings
from train.draws import SampleDraws
from train.engine.averaging import AveragedWeights
from train.engine.checkpoints import read_checkpoint, write_checkpoint
from train.engine.run_state import RunState
from train.engine.strategies import finish_step, open_accelerator, plain_module, prepare, zero_stage
from train.settings import EmaSettings, TrainSettings


class SmallModule(nn.Module):
    """A convolution, a frozen and two trained linear layers, a gate of one number and a buffer; sizes are odd."""

    def __init__(self, width: int = 11) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 3, padding=1)
        self.frozen = nn.Linear(5, 7).requires_grad_(False)
        self.first = nn.Linear(7, width)
        self.second = nn.Linear(width, 3)
        self.unused = nn.Linear(3, 3)
        self.gate = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Tensor, draws: SampleDraws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen += 1
        noise = draws.normal(*batch.shape[1:]).to(batch)
        hidden = self.convolution(batch + 0.1 * noise).mean(dim=(2, 3))  # (N, 5)
        hidden = torch.tanh(self.first(self.frozen(hidden)))  # (N, W)
        out = self.second(hidden) * (1 + self.gate)  # (N, 3)
        loss = (out.float() - batch.mean(dim=(2, 3)).float()).square().mean()
        return loss, {"size": out.detach().float().abs().mean()}


def sample(number: int) -> Tensor:
    return torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(number)) + 1


def small_settings(given: dict[str, Any]) -> TrainSettings:
    values = {
        "task": "vae", "name": "small", "runs_dir": given["folder"], "steps": given["steps"],
        "batch_size": given.get("batch_size", 4), "accumulate": given.get("accumulate", 1),
        "engine.strategy": given["strategy"], "engine.precision": given.get("precision", "no"),
        "optimizer.kind": given.get("kind", "adamw"), "optimizer.max_grad_norm": 0.5,
    }  # fmt: skip
    return load_settings(TrainSettings, [], [f"{key}={value}" for key, value in values.items()])


@torch.no_grad()
def shown(accelerator: Accelerator, wrapped: nn.Module, module: nn.Module, ema: AveragedWeights) -> float | None:
    """Validation as the trainer does it: the main process alone runs the averaged module."""
    with ema.averaged(), plain_module(accelerator, wrapped):
        if not accelerator.is_main_process:
            return None
        return float(module(sample(0)[None].to(accelerator.device), SampleDraws(0, 0, [0]), 0)[0])


def run(given: dict[str, Any]) -> dict[str, Any]:
    """Train, resuming by itself, and report what happened."""
    settings = small_settings(given)
    accelerator = open_accelerator(settings)
    if zero_stage(accelerator) == 3:  # else parameters as small as these would stay whole
        zero = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_param_persistence_threshold"] = 0
    torch.manual_seed(0)
    module = SmallModule(given.get("width", 11)).to(accelerator.device, memory_format=torch.channels_last)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [{"params": parameters[:3], "name": "first"}, {"params": parameters[3:], "name": "second", "lr": 0.01}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, weight_decay=0.01)
    wrapped, optimizer = prepare(accelerator, module, optimizer)
    ema = AveragedWeights(module, EmaSettings(decay=0.5))
    state = RunState(module, wrapped, optimizer, ema)
    done = read_checkpoint(settings.folder / "checkpoints", state, accelerator)
    report: dict[str, Any] = {"resumed": done, "losses": [], "norms": [], "applied": [], "position": state.position}
    if "disk" in given:  # no file can grow beyond so many bytes: as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (given["disk"], given["disk"]))
    for step in range(done, settings.steps):
        total = 0.0
        for part in range(settings.accumulate):
            first = ((step * settings.accumulate + part) * accelerator.num_processes) + accelerator.process_index
            numbers = range(first * settings.batch_size, (first + 1) * settings.batch_size)
            batch = torch.stack([sample(number) for number in numbers]).to(accelerator.device)
            if step == given.get("not_finite_at") and accelerator.process_index == accelerator.num_processes - 1:
                batch[0, 0, 0, 0] = float("inf")
            with accelerator.accumulate(wrapped):
                loss, _ = wrapped(batch, SampleDraws(0, step, numbers), step)
                accelerator.backward(loss)
            total += float(loss.detach()) / settings.accumulate
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        report["gradient_storages"] = len({gradient.untyped_storage().data_ptr() for gradient in gradients})
        norm, applied = finish_step(accelerator, wrapped, optimizer, settings.optimizer.max_grad_norm)
        state.step, state.skipped = step + 1, state.skipped + (not applied)
        if applied:
            ema.update(step)
        mean = accelerator.reduce(torch.tensor(total), "mean")
        report["losses"].append(float(mean))
        report["norms"].append(norm)
        report["applied"].append(applied)
        if state.step % given.get("checkpoint_every", 1) == 0:
            state.position = {"passes": state.step * settings.accumulate}
            write_checkpoint(settings.folder / "checkpoints", state, accelerator, given.get("keep", 2))
        if given.get("validate"):
            report["shown"] = shown(accelerator, wrapped, module, ema)
        if given.get("seconds_a_step"):
            time.sleep(given["seconds_a_step"])
    accelerator.wait_for_everyone()
    report["skipped"], report["processes"] = state.skipped, accelerator.num_processes
    if accelerator.is_main_process:
        Path(given["folder"], "report.json").write_text(json.dumps(report))
    return report


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        for one in json.loads(sys.argv[1]):
            run(one)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
