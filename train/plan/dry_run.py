"""`subject-diffusion train --dry-run`: what a run would take, before a GPU is paid for. Every figure is an estimate.

subject-diffusion train --config configs/train/sd21.yaml --dry-run --gpus 32 --gpu a100 --price 2
Networks are built without weights on tensors without values: no GPU, no network, no shards are needed, some seconds.
Order: networks.py (what is built) -> measure.py (kept and computed) -> memory.py (by strategy) -> this file (time,
cost, data) -> text.py (the page).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from train.engine.gpus import Gpu, find_gpu
from train.plan.measure import BOTH_PARTS, Measured, measure
from train.plan.memory import StrategyMemory, features_are_cached, memory_by_strategy
from train.plan.networks import BatchShape, batch_shape
from train.plan.options import PlanOptions, add_arguments, check_options, options_of
from train.settings import TrainSettings

__all__ = ["Plan", "PlanOptions", "add_arguments", "options_of", "plan", "plan_json", "plan_of", "print_plan"]


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one part of the networks."""

    part: str
    total: int
    trained: int


@dataclass(frozen=True)
class SampleFlops:
    """FLOPs of one sample of the fullest batch."""

    forward: int
    backward: int
    recomputed: int  # of activations that are not kept
    autoencoder: int  # 0: cached
    image_tower: int

    @property
    def total(self) -> int:
        return self.forward + self.backward + self.recomputed + self.autoencoder + self.image_tower


@dataclass(frozen=True)
class Duration:
    """Of a run at an assumed share of the GPUs' peak."""

    gpu: str
    gpus: int
    samples_per_second: float  # all GPUs together
    seconds_a_step: float
    hours: float
    dollars: float | None


@dataclass(frozen=True)
class Plan:
    """Everything the page shows."""

    settings: TrainSettings
    options: PlanOptions
    gpu: Gpu
    shape: BatchShape
    parts: list[ParameterCount]
    patterns: dict[str, int]  # pattern -> trained parameters; one that matches two counts for the first
    recomputed: tuple[str, ...]  # parts whose activations the other half of the measurements recomputes
    kept: list[StrategyMemory]  # activations kept
    again: list[StrategyMemory]  # activations recomputed
    flops: SampleFlops
    duration: Duration
    samples_a_step: int
    stored_samples: dict[str, int | None]  # by source of shards; None: not known here

    @property
    def memory(self) -> list[StrategyMemory]:
        """By strategy, as `engine.checkpoint_activations` says."""
        return self.again if self.settings.engine.checkpoint_activations else self.kept


def plan(settings: TrainSettings, options: PlanOptions) -> Plan:
    """Count and measure a run.

    Raises:
        UserError: a task without a plan, an unknown GPU, numbers that make no sense, a model file that cannot be built.
    """
    check_options(options)
    return plan_of(settings, options, measure(settings, _recomputed(settings)))


def plan_of(settings: TrainSettings, options: PlanOptions, measured: Measured) -> Plan:
    """The plan of a run whose networks have been measured."""
    gpu, shape = find_gpu(options.gpu), batch_shape(settings, measured.networks)
    flops = _flops(settings, measured, shape)
    samples = settings.batch_size * settings.accumulate * options.gpus
    return Plan(
        settings=settings,
        options=options,
        gpu=gpu,
        shape=shape,
        parts=_parts(measured),
        patterns=_patterns(measured),
        recomputed=_recomputed(settings),
        kept=memory_by_strategy(settings, measured, options.gpus, recomputed=False),
        again=memory_by_strategy(settings, measured, options.gpus, recomputed=True),
        flops=flops,
        duration=_duration(settings, options, gpu, flops, samples),
        samples_a_step=samples,
        stored_samples={name: _stored(source.folder) for name, source in settings.data.shards.items()},
    )


def _recomputed(settings: TrainSettings) -> tuple[str, ...]:
    return tuple(settings.engine.checkpoint_activations) or BOTH_PARTS


def _parts(measured: Measured) -> list[ParameterCount]:
    """By network; the adapter by its parts, the UNet's keys and values apart from the rest."""
    total: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for name, parameter in measured.networks.trainable.named_parameters():
        first, second = name.split(".")[:2]
        part = f"adapter, {second.replace('_', ' ')}" if first == "adapter" else first.replace("_", " ")
        if first == "unet":
            part = "unet, cross-attention keys and values" if re.search(r"\.attn2\.to_[kv]\.", name) else "unet, rest"
        total[part] += parameter.numel()
        trained[part] += parameter.numel() if parameter.requires_grad else 0
    counts = [ParameterCount(part, number, trained[part]) for part, number in total.items()]
    counts.append(ParameterCount("autoencoder", measured.vae.parameters, 0))
    if measured.tower is not None:
        counts.append(ParameterCount("image tower", measured.tower.parameters, 0))
    return counts


def _patterns(measured: Measured) -> dict[str, int]:
    parameters = dict(measured.networks.trainable.named_parameters())
    found = dict.fromkeys(measured.networks.patterns, 0)
    for name in measured.networks.trained:
        pattern = next(pattern for pattern in found if re.fullmatch(pattern, name))
        found[pattern] += parameters[name].numel()
    return found


def _flops(settings: TrainSettings, measured: Measured, shape: BatchShape) -> SampleFlops:
    live = not features_are_cached(settings)
    again = sum(measured.recomputed_flops[part] for part in settings.engine.checkpoint_activations)
    tower = measured.tower.flops * shape.subjects * shape.references if measured.tower else 0
    return SampleFlops(measured.forward_flops, measured.backward_flops, again, measured.vae.flops * live, tower * live)


def _duration(settings: TrainSettings, options: PlanOptions, gpu: Gpu, flops: SampleFlops, samples: int) -> Duration:
    speed = gpu.peak_flops(settings.engine.precision, settings.engine.tf32) * options.share_of_peak
    per_second = options.gpus * speed / flops.total
    hours = settings.steps * samples / per_second / 3600
    dollars = None if options.price is None else hours * options.gpus * options.price
    return Duration(gpu.name, options.gpus, per_second, samples / per_second, hours, dollars)


def _stored(folder: str | None) -> int | None:
    """Samples in the finished shards of a local folder; None where none is, or where asking would need the network."""
    if folder is None or "://" in folder or not Path(folder).expanduser().is_dir():
        return None
    from data_pipeline.shards.reader import list_shards, read_stats

    return sum(read_stats(shard).kept for shard in list_shards(Path(folder).expanduser())) or None


def plan_json(found: Plan) -> dict[str, Any]:
    """The plan as plain values: bytes, FLOPs, hours."""

    def row(memory: StrategyMemory) -> dict[str, Any]:
        return asdict(memory) | {
            "total": memory.total(found.settings.batch_size),
            "largest_batch": memory.largest_batch(found.gpu.memory_gib * 2**30),
        }

    return {
        "estimate": True,
        "settings": found.settings.model_dump(mode="json"),
        "options": asdict(found.options),
        "gpu": asdict(found.gpu),
        "fullest_batch": asdict(found.shape),
        "parameters": [asdict(part) for part in found.parts],
        "patterns": found.patterns,
        "memory_bytes": {"kept": [row(one) for one in found.kept], "recomputed": [row(one) for one in found.again]},
        "flops_a_sample": asdict(found.flops) | {"total": found.flops.total},
        "duration": asdict(found.duration),
        "samples_a_step": found.samples_a_step,
        "stored_samples": found.stored_samples,
    }


def print_plan(settings: TrainSettings, options: PlanOptions) -> None:
    """What `--dry-run` does."""
    from train.plan.text import plan_text

    found = plan(settings, options)
    print(json.dumps(plan_json(found), indent=1) if options.as_json else plan_text(found))
