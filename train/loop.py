"""The training loop, one for every model: batch -> loss -> optimiser -> EMA -> log -> checkpoint -> validation.

All that is trained sits in one module, the data position is a function of the step, and the random numbers of a sample
come from the seed and its number: to resume after any kill, run the same command again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from data_pipeline.settings import write_settings
from train.draws import SampleDraws
from train.engine.averaging import AveragedWeights
from train.engine.checkpoints import read_checkpoint, write_checkpoint
from train.engine.faults import FaultWatch, leave_signals_to_the_loop
from train.engine.optimizers import build_optimizer
from train.engine.processes import check_same_data
from train.engine.profiling import ProfileWindow
from train.engine.reporting import Report, learning_rates
from train.engine.run_state import RunState
from train.engine.schedule import learning_rate_factor
from train.engine.strategies import finish_step, open_accelerator, plain_module, prepare
from train.settings import RunSettings, TrainSettings
from train.stream import Resumable
from train.tasks import Task, build_task


def train(settings: TrainSettings) -> Path:
    """Train one model from its newest checkpoint (or from nothing) to `settings.steps`.

    Returns:
        The folder with the exported EMA weights.
    Raises:
        UserError: inputs missing, a checkpoint that does not fit, a full disk, or a loss that stays non-finite.
    """
    return run_loop(settings, lambda device: build_task(settings, device))


def run_loop(settings: RunSettings, build: Callable[[torch.device], Task]) -> Path:
    """The loop around any task, as `train` with `build` giving the task on its device."""
    accelerator = open_accelerator(settings)
    if accelerator.device.type == "cuda" and settings.engine.tf32:
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(settings.seed)
    task = build(accelerator.device)
    state, ema = _begin(settings, accelerator, task)
    if accelerator.is_main_process:
        settings.folder.mkdir(parents=True, exist_ok=True)
        write_settings(settings, settings.folder / "settings.yaml")
        print(_opening(settings, accelerator, state))
    run = _Run(settings, accelerator, task, state, ema)
    with run.faults:
        run.go()
    accelerator.end_training()
    return settings.folder / "export"


def _begin(settings: RunSettings, accelerator: Accelerator, task: Task) -> tuple[RunState, AveragedWeights]:
    """Everything that resumes, at the newest checkpoint or at nothing.

    Raises:
        UserError: a checkpoint that does not fit; data that differ between processes.
    """
    module = task.module
    if settings.engine.channels_last:
        module = module.to(memory_format=torch.channels_last)
    module = module.to(accelerator.device)
    wrapped, optimizer = prepare(accelerator, module, build_optimizer(module, settings.optimizer))
    ema = AveragedWeights(module, settings.ema)
    state = RunState(module, wrapped, optimizer, ema)
    if hasattr(task.dataset, "position"):
        check_same_data(cast(Resumable, task.dataset).position(0))
    done = read_checkpoint(settings.folder / "checkpoints", state, accelerator)
    if done and state.position:
        cast(Resumable, task.dataset).resume(state.position, done * settings.accumulate)
    return state, ema


def _opening(settings: RunSettings, accelerator: Accelerator, state: RunState) -> str:
    parameters = [p for p in state.module.parameters() if p.requires_grad]
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
    samples = settings.batch_size * settings.accumulate * accelerator.num_processes
    return (
        f"{settings.name}: {count:,} trained parameters, {settings.steps:,} steps of {samples} samples on "
        f"{accelerator.device} x {accelerator.num_processes}, {settings.engine.strategy}; "
        + (f"resumes at step {state.step:,}" if state.step else "from nothing")
    )


class StepBatches(Sampler[list[int]]):
    """Sample numbers by arithmetic: forward pass p of process r takes the B samples from (p · processes + r) · B on."""

    def __init__(self, passes: range, batch_size: int, process: int, processes: int) -> None:
        self.passes, self.batch_size, self.process, self.processes = passes, batch_size, process, processes

    def __len__(self) -> int:
        return len(self.passes)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(self.numbers(number)) for number in self.passes)

    def numbers(self, number: int) -> range:
        """The samples of one forward pass."""
        first = (number * self.processes + self.process) * self.batch_size
        return range(first, first + self.batch_size)


class _Pass(NamedTuple):
    """One forward pass, for those who look for what went wrong in it."""

    loss: Tensor
    keys: Sequence[str]


class _Run:
    """One run from `state.step` on; each job below is a short method."""

    def __init__(
        self, settings: RunSettings, accelerator: Accelerator, task: Task, state: RunState, ema: AveragedWeights
    ) -> None:
        self.settings, self.accelerator, self.task, self.state, self.ema = settings, accelerator, task, state, ema
        self.report = Report(settings, accelerator, done=state.step)
        self.faults = FaultWatch(settings, accelerator, skipped=state.skipped)
        self.profile = ProfileWindow(settings, accelerator)
        passes = range(state.step * settings.accumulate, settings.steps * settings.accumulate)
        self.sampler = StepBatches(
            passes, settings.batch_size, accelerator.process_index, accelerator.num_processes
        )  # fmt: skip
        self.norm = 0.0  # of the last step's gradients

    def go(self) -> None:
        batches = iter(self._loader())
        main = self.accelerator.is_main_process
        progress = tqdm(
            total=self.settings.steps, initial=self.state.step, disable=not main, mininterval=10, unit="step",
            desc=self.settings.name,
        )  # fmt: skip
        while self.state.step < self.settings.steps and not self.faults.stop:
            self._step(batches)
            progress.update()
            self._after_step()
        progress.close()
        self.profile.close()
        if self.faults.stop and main:
            why = f"minutes={self.settings.minutes:g} are over" if self.faults.stop == "minutes" else self.faults.stop
            print(f"{self.settings.name}: {why}; checkpoint written at step {self.state.step:,}")
        if self.faults.stop in (None, "minutes"):  # after a signal there is no time for more
            self._export()
        self.report.close()

    def _loader(self) -> DataLoader[Any]:
        workers = self.task.loader_workers
        return DataLoader(
            self.task.dataset, batch_sampler=self.sampler, num_workers=workers, collate_fn=self.task.collate,
            prefetch_factor=4 if workers else None, persistent_workers=workers > 0,
            worker_init_fn=leave_signals_to_the_loop, pin_memory=self.accelerator.device.type == "cuda",
        )  # fmt: skip

    def _step(self, batches: Iterator[Any]) -> None:
        """One optimiser step, applied or skipped."""
        settings, state = self.settings, self.state
        self.profile.before(state.step)
        factor = learning_rate_factor(state.step, settings.steps, settings.optimizer)
        for group in state.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        with self.report.flops.counting():
            passes = [self._forward_backward(part, batches) for part in range(settings.accumulate)]
            self.norm, applied = finish_step(
                self.accelerator, state.wrapped, state.optimizer, settings.optimizer.max_grad_norm
            )
        if self.faults.after_step(state.step, applied, passes):
            self.ema.update(state.step)
        self.profile.after(state.step)
        state.step += 1
        state.skipped = self.faults.skipped

    def _forward_backward(self, part: int, batches: Iterator[Any]) -> _Pass:
        number = self.state.step * self.settings.accumulate + part
        with self.report.waiting():
            collated = next(batches)
        numbers = self.sampler.numbers(number)
        draws = SampleDraws(self.settings.seed, self.state.step, numbers)
        batch = self.task.batch(collated)
        with self.accelerator.accumulate(self.state.wrapped):
            loss, metrics = self.state.wrapped(batch, draws, self.state.step)
            self.accelerator.backward(loss)
        self.report.forward_pass({"loss": loss, **metrics}, self.task.counts(collated))
        return _Pass(loss.detach(), self.task.keys(collated) or [f"sample {one}" for one in numbers])

    def _after_step(self) -> None:
        """Log, checkpoint and validate where it is time; all processes call it."""
        report, step = self.settings.report, self.state.step
        last = step == self.settings.steps
        if step % report.log_every == 0 or last:
            rates = learning_rates(self.state.optimizer)
            self.report.log(step, rates, skipped=self.state.skipped, gradient_norm=self.norm)
        if step % report.checkpoint_every == 0 or last or self.faults.stop:
            with self.report.away():
                self._checkpoint()
        if step % report.validate_every == 0 or last:
            with self.report.away(), self._on_main_alone() as main:
                if main:
                    self._validate()

    def _checkpoint(self) -> None:
        if hasattr(self.task.dataset, "position"):
            position = cast(Resumable, self.task.dataset).position(self.state.step * self.settings.accumulate)
            self.state.position = position
        folder, keep = self.settings.folder / "checkpoints", self.settings.report.checkpoints_kept
        write_checkpoint(folder, self.state, self.accelerator, keep)

    def _validate(self) -> None:
        folder = self.settings.folder / "validation"
        folder.mkdir(parents=True, exist_ok=True)
        picture = folder / f"step-{self.state.step:08d}.png"
        self.report.validation(self.state.step, self.task.validate(picture), picture)

    def _export(self) -> None:
        folder = self.settings.folder / "export"
        with self._on_main_alone() as main:
            if main:
                self.task.export(folder)
                print(f"{self.settings.name}: weights in {folder}")

    @contextmanager
    def _on_main_alone(self) -> Iterator[bool]:
        """The averaged weights are in the module; what the main process does inside needs none of the others."""
        with self.ema.averaged(), plain_module(self.accelerator, self.state.wrapped):
            yield self.accelerator.is_main_process
            self.faults.wait()
