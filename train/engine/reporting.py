"""What a run tells about itself: log.jsonl, validation.jsonl, a line on the console, trackers (accelerate's own).

Metrics of forward passes stay on their device until a row is due; then one gather brings those of all processes, with
waiting times and memory, to the main process, which writes. Nothing else here waits for a GPU or another process.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import filter_trackers
from accelerate.utils import is_tensorboard_available, is_wandb_available
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data_pipeline.errors import UserError
from train.engine.optimizers import REST
from train.engine.throughput import StepFlops, peak_flops, peak_memory_gb
from train.settings import RunSettings

LOGS = ("log.jsonl", "validation.jsonl", "skipped.jsonl")  # rows of a run, each with its `step`
Row = dict[str, float | None]


class Report:
    """The log of one run, from the step it goes on from; made by all processes."""

    def __init__(self, settings: RunSettings, accelerator: Accelerator, *, done: int) -> None:
        """
        Args:
            done: steps before this run; what was logged after them, by a run that was killed, is forgotten.
        Raises:
            UserError: a tracker that is not installed.
        """
        self.settings, self.accelerator = settings, accelerator
        self.main = accelerator.is_main_process
        self.samples_a_step = settings.batch_size * settings.accumulate * accelerator.num_processes
        self.flops = StepFlops()
        self.peak = peak_flops(accelerator.device, settings.engine)
        self._names: tuple[str, ...] = ()
        self._window: list[Tensor] = []  # metrics of each forward pass since the last row
        self._counts: dict[str, int] = {}
        self._logged, self._waited, self._away = done, 0.0, 0.0
        self._clock = time.perf_counter()
        if self.main:
            settings.folder.mkdir(parents=True, exist_ok=True)
            for name in LOGS:
                cut_rows(settings.folder / name, after=done)
        open_trackers(accelerator, settings, done)

    def forward_pass(self, metrics: Mapping[str, Tensor], counts: Mapping[str, int] | None = None) -> None:
        """Take in scalar metrics, the same names at every pass; NaN where a batch says nothing about one.

        Args:
            counts: of things in the batch, such as entities; logged as their number a sample.
        """
        names = tuple(metrics)
        if self._window and names != self._names:
            raise ValueError(f"metrics {', '.join(names)}: expected {', '.join(self._names)} at every forward pass")
        self._names = names
        self._window.append(torch.stack([value.detach().float() for value in metrics.values()]))  # (M,)
        for name, count in (counts or {}).items():
            self._counts[name] = self._counts.get(name, 0) + count

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def away(self) -> Iterator[None]:
        """Around what is no training, such as checkpoints and validation: its time does not count."""
        start = time.perf_counter()
        yield
        self._away += time.perf_counter() - start

    def log(self, step: int, rates: Mapping[str, float], *, skipped: int, gradient_norm: float) -> Row:
        """Write the row of the steps since the last one. Called by all processes.

        Args:
            step: steps done.
            rates: learning rates by the name of their group, `learning_rates(optimizer)`.
            skipped: steps skipped since the run began.
            gradient_norm: of the last step, before clipping.
        """
        gathered = self._gather()
        elapsed = max(1e-9, time.perf_counter() - self._clock - self._away)
        steps = max(1, step - self._logged)
        row: Row = {"step": step, "samples": step * self.samples_a_step}
        row |= self._means(gathered)
        row |= _named_rates(rates)
        row["gradient_norm"] = gradient_norm if math.isfinite(gradient_norm) else None
        row["samples_per_second"] = steps * self.samples_a_step / elapsed
        row |= self._usage(gathered, steps, elapsed)
        row["seconds_left"] = (self.settings.steps - step) * elapsed / steps
        row["skipped"] = skipped
        row = {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in row.items()}
        self._window, self._counts = [], {}
        self._logged, self._waited, self._away, self._clock = step, 0.0, 0.0, time.perf_counter()
        if self.main:
            self._append("log.jsonl", row)
            self._track("train", row, step)
            tqdm.write(console_line(self.settings, row))
        return row

    def validation(self, step: int, figures: Mapping[str, float], picture: Path) -> None:
        """Write down what `Task.validate` has found. Called by the main process."""
        self._append("validation.jsonl", {"step": step, **figures})
        self._track("validation", figures, step)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = np.asarray(Image.open(picture).convert("RGB"))[None]  # (1, H, W, 3)
                tracker.log_images({"validation": pixels}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({"validation": [Image.open(picture)]}, step=step)
        told = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        tqdm.write(f"{self.settings.name}  step {step:,}  validation  {told}")

    def close(self) -> None:
        """Let the trackers finish their files. Called by all processes."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []

    def _gather(self) -> Tensor:
        """(processes, 2M + 2 + counts): sums and numbers of the window's metrics, seconds waited, memory, counts."""
        device = self.accelerator.device
        values = (
            torch.stack(self._window) if self._window else torch.zeros(0, len(self._names), device=device)
        )  # (W, M)
        known = values.isfinite()
        others = [self._waited, peak_memory_gb(device), *(float(count) for count in self._counts.values())]
        own = torch.cat([values.where(known, 0).sum(0), known.sum(0).float(), torch.tensor(others, device=device)])
        together: Tensor = self.accelerator.gather(own[None])
        return together.cpu()

    def _means(self, gathered: Tensor) -> Row:
        """Over all values that say something, whatever process they come from."""
        total = gathered.sum(dim=0).tolist()
        sums, numbers = total[: len(self._names)], total[len(self._names) : 2 * len(self._names)]
        return {n: s / k if k else None for n, s, k in zip(self._names, sums, numbers, strict=True)}

    def _usage(self, gathered: Tensor, steps: int, elapsed: float) -> Row:
        waited, memory, *counts = gathered[:, 2 * len(self._names) :].T
        flops = self.flops.total and self.flops.total * steps / elapsed
        usage: Row = {
            "data_wait_share": float(waited.max()) / elapsed,  # of the process that waited longest: all wait for it
            "memory_gb": float(memory.max()),
            "tflops_per_second": flops and flops / 1e12,  # of one process
            "mfu": flops and self.peak and flops / self.peak,
        }
        per_sample = (float(count.sum()) / (steps * self.samples_a_step) for count in counts)
        return usage | dict(zip((f"{name}_per_sample" for name in self._counts), per_sample, strict=True))

    def _append(self, name: str, row: Mapping[str, float | None]) -> None:
        path = self.settings.folder / name
        try:
            with open(path, "a") as handle:
                handle.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); free the disk and give the same command again"
            ) from error

    def _track(self, kind: str, row: Mapping[str, float | None], step: int) -> None:
        values = {f"{kind}/{name}": value for name, value in row.items() if value is not None and name != "step"}
        self.accelerator.log(values, step=step)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """By the name of the group, or its number where it has none."""
    return {str(group.get("name", index)): float(group["lr"]) for index, group in enumerate(optimizer.param_groups)}


def _named_rates(rates: Mapping[str, float]) -> Row:
    """`learning_rate` is that of the parameters without a group of their own, where there are such."""
    main = rates.get(REST, next(iter(rates.values())))
    others: Row = {f"learning_rate_{name}": rate for name, rate in rates.items() if name != REST}
    return {"learning_rate": main, **(others if len(rates) > 1 else {})}


def console_line(settings: RunSettings, row: Mapping[str, float | None]) -> str:
    """What a person glances at; the rest of the row is in log.jsonl and the trackers."""
    known = {name: value for name, value in row.items() if value is not None}
    losses = [f"{name} {known[name]:.4g}" for name in ("loss", "denoising", "attention") if name in known]
    parts = [
        f"{settings.name}  step {known['step']:,.0f}/{settings.steps:,}",
        *(losses or ["loss not finite"]),
        f"lr {known['learning_rate']:.3g}",
        f"{known['samples_per_second']:.4g} samples/s",
        f"wait {known['data_wait_share']:.1%}",
        f"{known['memory_gb']:.1f} GB",
    ]
    if "mfu" in known:
        parts.append(f"MFU {known['mfu']:.0%}")
    elif known.get("tflops_per_second", 0) >= 0.1:
        parts.append(f"{known['tflops_per_second']:.3g} TFLOP/s")
    if known["skipped"]:
        parts.append(f"skipped {known['skipped']:.0f}")
    return "  ".join([*parts, f"{_duration(known['seconds_left'])} left"])


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 48:
        return f"{hours / 24:.1f} d"
    if minutes >= 100:
        return f"{hours:.1f} h"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def cut_rows(path: Path, *, after: int) -> None:
    """Keep the rows of a JSON-lines file up to step `after`; a last line that a kill cut short goes too."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if (step := _step_of(line)) is not None and step <= after]
    if len(kept) < len(lines):
        part = path.with_name(f"{path.name}.part")
        part.write_text("".join(kept))
        part.replace(path)


def _step_of(line: str) -> float | None:
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def open_trackers(accelerator: Accelerator, settings: RunSettings, done: int) -> None:
    """Start the trackers that `report.trackers` names, TensorBoard's files in `tensorboard/` of the run's folder.

    Raises:
        UserError: one of them is not installed.
    """
    present = {"tensorboard": is_tensorboard_available(), "wandb": is_wandb_available()}
    for name in settings.report.trackers:
        if not present[name]:
            raise UserError(f"report.trackers: {name} is not installed; pip install {name}, or take it out of the list")
    folder = settings.folder / "tensorboard"
    options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": done + 1}}  # as in log.jsonl
    if "wandb" in settings.report.trackers and accelerator.is_main_process:
        options["wandb"] = {"name": settings.name, "id": _run_id(settings.folder), "resume": "allow"}
        options["wandb"] |= {"dir": str(settings.folder), "config": settings.model_dump(mode="json")}
    accelerator.log_with = filter_trackers(list(settings.report.trackers), folder)
    accelerator.project_configuration.logging_dir = str(folder)
    accelerator.init_trackers(settings.report.project, init_kwargs=options)


def _run_id(folder: Path) -> str:
    """The same for all starts of a run, so that W&B shows them as one."""
    file = folder / "wandb-id"
    if not file.exists():
        file.write_text(uuid4().hex[:12])
    return file.read_text()
