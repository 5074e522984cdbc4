"""The training loop, one for every model: batch -> loss -> optimiser -> EMA -> log -> checkpoint -> validation.

All that is trained sits in one module, the data position is a function of the step, and the random numbers of a step
come from (seed, rank, step): to resume after any kill, run the same command again.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from data_pipeline.errors import UserError
from data_pipeline.settings import write_settings
from train.checkpoints import read_checkpoint, write_checkpoint
from train.schedule import learning_rate_factor
from train.settings import TrainSettings
from train.tasks import Task, build_task


class StepBatches(Sampler[list[int]]):
    """Sample indices by arithmetic: step s of rank r takes the r-th slice of samples [s·B·world, (s+1)·B·world)."""

    def __init__(self, first_step: int, last_step: int, batch_size: int, rank: int, world: int) -> None:
        self.steps = range(first_step, last_step)
        self.batch_size, self.rank, self.world = batch_size, rank, world

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            start = (step * self.world + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


def train(settings: TrainSettings) -> Path:
    """Train one model from its newest checkpoint (or from nothing) to `settings.steps`.

    Returns:
        The folder with the exported EMA weights.
    Raises:
        UserError: inputs missing, a checkpoint that does not fit, a full disk, or a loss that stays non-finite.
    """
    accelerator = _accelerator(settings)
    torch.manual_seed(settings.seed)
    task = build_task(settings, accelerator.device)
    module: nn.Module = task.module
    if settings.channels_last:
        module = module.to(memory_format=torch.channels_last)
    module = module.to(accelerator.device)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=settings.optimizer.learning_rate,
        betas=(0.9, settings.optimizer.beta2),
        weight_decay=settings.optimizer.weight_decay,
    )
    ema = {n: p.detach().float().clone() for n, p in module.named_parameters() if p.requires_grad}
    done = read_checkpoint(settings.folder / "checkpoints", module, ema, optimizer)
    wrapped, optimizer = accelerator.prepare(module, optimizer)
    run = _Run(settings, accelerator, task, module, wrapped, optimizer, trained, ema)
    if accelerator.is_main_process:
        settings.folder.mkdir(parents=True, exist_ok=True)
        write_settings(settings, settings.folder / "settings.yaml")
        count = sum(parameter.numel() for parameter in trained)
        print(
            f"{settings.name}: {count:,} trained parameters, {settings.steps:,} steps of {run.samples_a_step} samples "
            f"on {accelerator.device} x {accelerator.num_processes}; "
            + (f"resumes at step {done:,}" if done else "from nothing")
        )
    run.go(done)
    return settings.folder / "export"


def _accelerator(settings: TrainSettings) -> Accelerator:
    # Some parameters get no gradient in a step whose conditions were all dropped.
    handlers: list[Any] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    if not torch.cuda.is_available() and "WORLD_SIZE" in os.environ:
        # Without it, every process of a CPU run believes that it is alone.
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    return Accelerator(mixed_precision=settings.precision, cpu=not torch.cuda.is_available(), kwargs_handlers=handlers)


class _Run:
    """The moving parts of one run, so that each job below is a short method."""

    def __init__(
        self,
        settings: TrainSettings,
        accelerator: Accelerator,
        task: Task,
        module: nn.Module,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        trained: list[nn.Parameter],
        ema: dict[str, Tensor],
    ) -> None:
        self.settings, self.accelerator, self.task = settings, accelerator, task
        self.module, self.wrapped, self.optimizer, self.trained, self.ema = module, wrapped, optimizer, trained, ema
        self.samples_a_step = settings.batch_size * settings.accumulate * accelerator.num_processes
        self.stop_asked = False
        self.skipped_in_a_row = 0
        self.sums: dict[str, float] = {}
        self.summed = 0

    def go(self, done: int) -> None:
        previous = signal.signal(signal.SIGTERM, self._ask_stop)
        try:
            self._steps(done)
        finally:
            signal.signal(signal.SIGTERM, previous)
        if self.accelerator.is_main_process and not self.stop_asked:
            self._export()

    def _ask_stop(self, number: int, frame: FrameType | None) -> None:
        self.stop_asked = True

    def _steps(self, done: int) -> None:
        settings, main = self.settings, self.accelerator.is_main_process
        batches = iter(self._loader(done))
        progress = tqdm(
            total=settings.steps, initial=done, disable=not main, mininterval=10, unit="step", desc=settings.name
        )
        clock, waited = time.perf_counter(), 0.0
        for step in range(done, settings.steps):
            waited += self._step(step, batches)
            progress.update()
            finished = step + 1
            if main and finished % settings.log_every == 0:
                elapsed = time.perf_counter() - clock
                self._log(finished, elapsed, waited)
                clock, waited = time.perf_counter(), 0.0
            last = finished == settings.steps
            if main and (finished % settings.checkpoint_every == 0 or last or self.stop_asked):
                write_checkpoint(
                    settings.folder / "checkpoints",
                    finished,
                    self.module,
                    self.ema,
                    self._raw_optimizer(),
                    keep=settings.checkpoints_kept,
                )
            if main and (finished % settings.validate_every == 0 or last):
                self._validate(finished)
            if self.stop_asked:
                progress.write(f"{settings.name}: asked to stop; checkpoint written at step {finished:,}")
                break
        progress.close()

    def _loader(self, done: int) -> DataLoader[Any]:
        settings = self.settings
        sampler = StepBatches(
            done * settings.accumulate, settings.steps * settings.accumulate, settings.batch_size,
            self.accelerator.process_index, self.accelerator.num_processes,
        )  # fmt: skip
        workers = self.task.loader_workers
        return DataLoader(
            self.task.dataset, batch_sampler=sampler, num_workers=workers, collate_fn=self.task.collate,
            prefetch_factor=4 if workers else None, persistent_workers=workers > 0,
        )  # fmt: skip

    def _step(self, step: int, batches: Iterator[Any]) -> float:
        """One optimiser step; returns the seconds spent waiting for data."""
        settings, waited = self.settings, 0.0
        rate = settings.optimizer.learning_rate * learning_rate_factor(step, settings.steps, settings.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for part in range(settings.accumulate):
            start = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - start
            seed = hash((settings.seed, self.accelerator.process_index, step * settings.accumulate + part)) & (
                2**62 - 1
            )
            generator = torch.Generator().manual_seed(seed)
            with self.accelerator.autocast():
                loss, metrics = self.wrapped(batch, generator, step)
            self.accelerator.backward(loss / settings.accumulate)
            for name, value in {"loss": loss, **metrics}.items():
                self.sums[name] = self.sums.get(name, 0.0) + float(value.detach())
            self.summed += 1
        norm = self.accelerator.clip_grad_norm_(self.trained, settings.optimizer.max_grad_norm)
        if torch.isfinite(torch.as_tensor(norm)):
            self.optimizer.step()
            self._update_ema(step)
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= 10:
                raise UserError(
                    f"{settings.name}: gradients were not finite in 10 steps on end (last: step {step}); "
                    "lower optimizer.learning_rate"
                )
        self.optimizer.zero_grad(set_to_none=True)
        return waited

    @torch.no_grad()
    def _update_ema(self, step: int) -> None:
        # The decay grows with the steps, so that young weights do not linger in the average (Karras et al. 2024, 3.1).
        decay = min(self.settings.ema_decay, (1 + step) / (10 + step))
        parameters = dict(self.module.named_parameters())
        torch._foreach_lerp_(list(self.ema.values()), [parameters[name].float() for name in self.ema], 1 - decay)

    def _raw_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _log(self, step: int, elapsed: float, waited: float) -> None:
        settings = self.settings
        row: dict[str, float] = {"step": step, "samples": step * self.samples_a_step}
        row |= {name: total / self.summed for name, total in self.sums.items()}
        row["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        row["samples_per_second"] = settings.log_every * self.samples_a_step / elapsed
        row["data_wait_share"] = waited / elapsed
        self.sums, self.summed = {}, 0
        with open(settings.folder / "log.jsonl", "a") as handle:
            handle.write(json.dumps({key: float(f"{value:.6g}") for key, value in row.items()}) + "\n")
        shown = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in ("step", "samples"))
        tqdm.write(f"{settings.name}  step {step:,}/{settings.steps:,}  {shown}")

    def _validate(self, step: int) -> None:
        folder = self.settings.folder / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        with self._averaged():
            metrics = self.task.validate(folder / f"step-{step:08d}.png")
        with open(self.settings.folder / "validation.jsonl", "a") as handle:
            handle.write(json.dumps({"step": step, **metrics}) + "\n")
        tqdm.write(
            f"{self.settings.name}  step {step:,}  validation  " + "  ".join(f"{n} {v:.4g}" for n, v in metrics.items())
        )

    def _export(self) -> None:
        with self._averaged():
            self.task.export(self.settings.folder / "export")
        print(f"{self.settings.name}: weights in {self.settings.folder / 'export'}")

    def _averaged(self) -> _Averaged:
        return _Averaged(self.module, self.ema)


class _Averaged:
    """Inside this context the module holds the EMA weights and is in evaluation mode."""

    def __init__(self, module: nn.Module, ema: dict[str, Tensor]) -> None:
        self.module, self.ema = module, ema

    @torch.no_grad()
    def __enter__(self) -> None:
        parameters = dict(self.module.named_parameters())
        self.kept = {name: parameters[name].detach().clone() for name in self.ema}
        for name, value in self.ema.items():
            parameters[name].copy_(value)
        self.module.eval()

    @torch.no_grad()
    def __exit__(self, *exception: object) -> None:
        parameters = dict(self.module.named_parameters())
        for name, value in self.kept.items():
            parameters[name].copy_(value)
        self.module.train()
