"""What the trainer costs around the arithmetic: the real loop on toybox scenes.

Task subject at toybox size, on the shipped base and image encoder, as configs/train/toybox/subject.yaml has it. A run
has a few windows of some steps each; the first, in which memory and processes are warmed up, does not count. The clock
is read whenever a batch is put together, once a step; the share of waiting stands in the run's own log.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from data_pipeline.build_settings import DataSettings as BuildSettings
from data_pipeline.engine.build import build
from data_pipeline.settings import load_settings
from model.base_loading import SHIPPED
from train import loop
from train.draws import SampleDraws
from train.engine.optimizers import build_optimizer
from train.settings import REPOSITORY, TrainSettings, load_model_settings
from train.tasks import Task, build_task

from . import turns

CONFIG = REPOSITORY / "configs" / "train" / "toybox" / "subject.yaml"
SD21 = Path("configs/model/sd21.yaml")
NEVER = 10**9
NONE: Mapping[str, Any] = MappingProxyType({})  # changes to the settings
STEPS, WINDOWS = 5, 3  # of a window, of a run
SD_ROUNDS = 3  # of the full-size autoencoder, at most: 15 seconds each on one core
LIVE_BATCH = 8  # where scenes are rendered and encoded in every step
PAIRS = REPOSITORY / "configs" / "data" / "toybox_pairs.yaml"
SHARDS, SCENES_A_SHARD, SHARD_SIDE = 2, 128, 128


@dataclass(frozen=True)
class Windows:
    """What the windows of a run took; the first is left out."""

    seconds: list[float]  # a step
    processor: list[float]  # seconds of this process a step, all threads; loading processes not
    waiting: list[float]  # share of the time


def toybox_settings(folder: Path, changes: Mapping[str, Any]) -> TrainSettings:
    """The toybox subject run, kept below `folder`; no checkpoint or validation falls into a window.

    The pool of scenes is as large as a window, so that only the first window, which does not count, is a first pass
    over it; of a run's `data.cache_passes` passes one is.

    Args:
        changes: settings by dotted key, over those of the file.
    """
    own = {
        "name": "bench/run",
        "runs_dir": folder,
        "steps": NEVER,
        "report.log_every": STEPS,
        "report.checkpoint_every": NEVER,
        "report.validate_every": NEVER,
        "batch_size": 64,
    }
    values = {**own, **changes}
    values.setdefault("data.cache_scenes", STEPS * values["batch_size"])
    # The file names two runs that may not be here; their like is shipped.
    inputs = values.pop("inputs", {"clip": str(SHIPPED / "toybox" / "subject" / "image_encoder")})
    overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]
    return load_settings(TrainSettings, [CONFIG], overrides).model_copy(update={"inputs": inputs})


def run_loop(settings: TrainSettings) -> Windows:
    """Train from nothing until the last window is full."""
    shutil.rmtree(settings.folder, ignore_errors=True)
    clock = _Clock()

    def build(device: torch.device) -> Task:
        task = build_task(settings, device)
        task.batch = partial(_batch_by_the_clock, task.batch, clock, device)  # type: ignore[method-assign]
        return task

    with redirect_stdout(sys.stderr):
        loop.run_loop(settings, build)
    rows = [json.loads(line) for line in (settings.folder / "log.jsonl").read_text().splitlines()]
    return clock.windows([row["data_wait_share"] for row in rows])


def _batch_by_the_clock(batch: Callable[[Any], Any], clock: _Clock, device: torch.device, collated: Any) -> Any:
    clock.before_step(device)
    if clock.steps > STEPS * WINDOWS:
        signal.raise_signal(signal.SIGUSR1)  # the loop finishes this step and ends, without validation and export
    return batch(collated)


def run_bare(settings: TrainSettings) -> Windows:
    """Forward, backward and optimiser alone on the batches of `run_loop`, which lie ready in memory."""
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = build_task(settings, device)
    module = task.module.to(device)
    if settings.engine.channels_last:
        module = module.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(module, settings.optimizer)
    size, steps = settings.batch_size, range(STEPS * WINDOWS)
    batches = [task.batch(task.collate([task.dataset[step * size + row] for row in range(size)])) for step in steps]
    draws = [SampleDraws(settings.seed, step, range(step * size, (step + 1) * size)) for step in steps]
    clock = _Clock()
    for step in steps:
        clock.before_step(device)
        loss, _ = module(batches[step], draws[step], step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    clock.before_step(device)
    return clock.windows([0.0] * WINDOWS)


class _Clock:
    """Readings at the beginning of every window, and at the end of the last."""

    def __init__(self) -> None:
        self.steps = 0  # begun
        self.wall: list[float] = []
        self.processor: list[float] = []

    def before_step(self, device: torch.device) -> None:
        if self.steps % STEPS == 0:  # only there a GPU is waited for: between steps the loop does not
            turns.wait_for(device)
            self.wall.append(time.perf_counter())
            self.processor.append(time.process_time())
        self.steps += 1

    def windows(self, waiting: list[float]) -> Windows:
        """All but the first; of `waiting`, a share for each window, too."""
        wall, processor = (
            [(end - start) / STEPS for start, end in pairwise(readings)] for readings in (self.wall, self.processor)
        )
        return Windows(wall[1:], processor[1:], waiting[1:])


def in_turn(contenders: Mapping[str, Callable[[], Windows]], rounds: int) -> dict[str, Windows]:
    """Run every contender once a round; all windows of each together."""
    found = {name: Windows([], [], []) for name in contenders}
    for round_number in range(rounds):
        for name in list(contenders)[:: 1 if round_number % 2 == 0 else -1]:
            windows = contenders[name]()
            found[name].seconds.extend(windows.seconds)
            found[name].processor.extend(windows.processor)
            found[name].waiting.extend(windows.waiting)
    return found


def rows_of(found: Mapping[str, Windows], samples: int) -> dict[str, dict[str, float]]:
    rows = {}
    for name, windows in found.items():
        step = statistics.median(windows.seconds)
        rows[name] = {
            "seconds a step": step,
            "CPU seconds": statistics.median(windows.processor),
            "images/s": samples / step,
            "data wait %": 100 * statistics.median(windows.waiting),
        }
    return rows


def bench_overhead(options: argparse.Namespace, changes: Mapping[str, Any] = NONE) -> Iterator[turns.Table]:
    """The loop against a bare one over the same batches."""
    with _folder() as folder:
        settings = toybox_settings(folder, changes)
        contenders = {"trainer": partial(run_loop, settings), "bare loop": partial(run_bare, settings)}
        rows = rows_of(in_turn(contenders, options.rounds), settings.batch_size)
    bare = dict(rows["bare loop"])
    for row in rows.values():
        row["ratio"] = row["seconds a step"] / bare["seconds a step"]
        row["CPU ratio"] = row["CPU seconds"] / bare["CPU seconds"]
    share = rows["trainer"]["ratio"] - 1
    shapes = f"{_shapes(settings)}, latents and features cached, later passes over a pool; no checkpoint or validation"
    yield turns.Table("overhead", shapes, rows, (turns.Bar("trainer's overhead over a bare loop", share, 0.05),))


def bench_cache(options: argparse.Namespace, changes: Mapping[str, Any] = NONE) -> Iterator[turns.Table]:
    """The loop on cached and on live scenes; and what SD's autoencoder takes for one picture."""
    with _folder() as folder:
        cached = toybox_settings(folder, {"batch_size": LIVE_BATCH, **changes})
        own = {"name": "bench/live", "batch_size": LIVE_BATCH}
        live = toybox_settings(folder, {**own, **changes, "data.cache_scenes": 0})
        contenders = {"cached": partial(run_loop, cached), "live": partial(run_loop, live)}
        rows = rows_of(in_turn(contenders, options.rounds), cached.batch_size)
    for row in rows.values():
        row["ratio"] = row["images/s"] / rows["live"]["images/s"]
    shapes = f"{_shapes(live)}; live: rendered by {live.data.workers} process(es), encoded at every step"
    yield turns.Table("cache", shapes, rows)
    yield sd_latents(min(options.rounds, SD_ROUNDS))


def bench_precision(options: argparse.Namespace, changes: Mapping[str, Any] = NONE) -> Iterator[turns.Table]:
    """The loop in float32 and in bf16 on this machine, a GPU or a CPU."""
    with _folder() as folder:
        plain = toybox_settings(folder, changes)
        contenders = {
            name: partial(run_loop, toybox_settings(folder, {**changes, "engine.precision": precision}))
            for name, precision in (("float32", "no"), ("bf16", "bf16"))
        }
        rows = rows_of(in_turn(contenders, options.rounds), plain.batch_size)
    for row in rows.values():
        row["times float32"] = row["images/s"] / rows["float32"]["images/s"]
    yield turns.Table("precision", f"{_shapes(plain)}, latents and features cached; bf16 by autocast", rows)


def sd_latents(rounds: int, side: int = 512) -> turns.Table:
    """Seconds to encode one picture with SD's autoencoder (random weights), and to read its latents from a file."""
    vae = AutoencoderKL(**load_model_settings(SD21).architecture["vae"]).eval().requires_grad_(False)
    picture = torch.randn(1, 3, side, side)
    with _folder() as folder, torch.no_grad():
        file = folder / "latents.safetensors"
        save_file({"latents": torch.randn(1, 4, side // 8, side // 8).half()}, file)

        def encode() -> torch.Tensor:
            return vae.encode(picture).latent_dist.mean  # (1, 4, h, w)

        taken = turns.median_seconds({"live": encode, "cached": partial(load_file, file)}, rounds, picture.device)
    rows = {name: {"seconds": each.wall, "CPU seconds": each.processor} for name, each in taken.items()}
    shapes = f"latents of one picture of {side} px by SD's autoencoder, fp32, medians of {rounds}"
    return turns.Table("cache", shapes, rows)


def bench_wait(options: argparse.Namespace, changes: Mapping[str, Any] = NONE) -> Iterator[turns.Table]:
    """The loop on live scenes with two loading processes: rendered, and out of shards."""
    with _folder() as folder:
        with redirect_stdout(sys.stderr):
            build_shards(folder / "shards")
        common: dict[str, Any] = {"data.cache_scenes": 0, "data.workers": 2, **changes}
        shards = {"rendered": {"folder": str(folder / "shards"), "filters": {"min_area": 0.02}}}
        of_shards = {"data.shards": shards, "data.scratch": folder / "scratch", "name": "bench/shards"}
        settings = {
            "toybox scenes": toybox_settings(folder, common),
            "shards": toybox_settings(folder, common | of_shards),
        }
        contenders = {name: partial(run_loop, each) for name, each in settings.items()}
        rows = rows_of(in_turn(contenders, options.rounds), settings["shards"].batch_size)
    bars = [
        turns.Bar(f"share of the time that waits for data, {name}", row["data wait %"] / 100, 0.02)
        for name, row in rows.items()
    ]
    shapes = f"{_shapes(settings['shards'])}, live, 2 loading processes; shards: scenes of {SHARD_SIDE} px"
    yield turns.Table("wait", shapes, rows, tuple(bars))


def build_shards(folder: Path) -> None:
    """Rendered scenes as the dataset builder writes them, with their true boxes and masks and several references."""
    own = {"source.scenes": SHARDS * SCENES_A_SHARD, "source.shard_size": SCENES_A_SHARD, "source.size": SHARD_SIDE}
    fixed = {"output": folder, "gallery": 0, "duplicates.remove": "false", "engine.workers": 1}
    build(load_settings(BuildSettings, [PAIRS], [f"{key}={value}" for key, value in {**own, **fixed}.items()]))


def _shapes(settings: TrainSettings) -> str:
    return (
        f"toybox subject model, {settings.data.size} px, batch {settings.batch_size}, {settings.engine.precision} "
        f"autocast, {WINDOWS - 1} windows of {settings.report.log_every} steps a round"
    )


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench-train-") as name:
        yield Path(name)
