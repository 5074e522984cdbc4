"""Bytes that one process of a run holds under each strategy, from what `measure.py` counted. Estimates.

T trained and F frozen parameters on N processes. ZeRO's shares: Rajbhandari et al., arXiv 1910.02054, figure 1; its
buffers: configs/deepspeed/. Not counted: validation, and compiled code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from torch import nn

from train.engine.gpus import GIB
from train.plan.measure import Activations, Measured
from train.settings import REPOSITORY, StrategyName, TrainSettings

FLOAT = 4  # bytes of a float32
CONTEXT = 1.0 * GIB  # assumed: CUDA context, libraries' work areas
FRAGMENTS = 1.05  # assumed: what the allocator holds for a byte of activations
BLOCK_8BIT = 256  # parameters that share one scale in each state of 8-bit Adam
SMALLEST_8BIT = 4096  # parameters of a tensor; smaller ones keep float32 states
STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)


@dataclass(frozen=True)
class StrategyMemory:
    """Bytes of one process under one strategy."""

    strategy: StrategyName
    parameters: float  # of the networks that are trained, frozen ones among them
    gradients: float
    optimizer: float  # its states, and under ZeRO the float32 weights that it moves
    ema: float
    buffers: float  # of communication
    frozen: float  # autoencoder and image tower
    activations: Activations
    encoding: float  # alive at once while the frozen networks look at a batch; before the activations are there
    host: float  # in main memory
    note: str = ""

    @property
    def standing(self) -> float:
        """On the GPU whatever the batch."""
        held = self.parameters + self.gradients + self.optimizer + self.ema + self.buffers + self.frozen
        return held + CONTEXT

    def total(self, batch_size: int) -> float:
        """On the GPU, at the height of a step."""
        return self.standing + FRAGMENTS * max(self.activations.of(batch_size), self.encoding)

    def largest_batch(self, memory: float) -> int:
        """Samples a forward pass that fit into so many bytes; 0: none."""
        left = (memory - self.standing) / FRAGMENTS
        if left < self.encoding:
            return 0
        return max(0, int((left - self.activations.fixed) / self.activations.per_sample))


def memory_by_strategy(
    settings: TrainSettings, measured: Measured, processes: int, *, recomputed: bool
) -> list[StrategyMemory]:
    """All strategies, in the settings' order, with everything else as the settings say."""
    return [_memory(strategy, settings, measured, processes, recomputed) for strategy in STRATEGIES]


def _memory(
    strategy: StrategyName, settings: TrainSettings, measured: Measured, processes: int, recomputed: bool
) -> StrategyMemory:
    network = measured.networks.trainable
    trained, frozen = _counts(network)
    average = float(FLOAT * trained) if settings.ema.decay else 0.0
    low = settings.engine.precision != "no"
    if strategy == "ddp":
        held = FLOAT * (trained + frozen) - (2 * _castable(network) if low else 0)
        states = adam_bytes(network, settings.optimizer.kind)
        gradients = float(FLOAT * trained)
        buffers = 0.0  # the gradients are views of the reductions' buckets
        shares = {"parameters": float(held), "gradients": gradients, "optimizer": states, "ema": average}
        on_host, note, activations = 0.0, "", measured.ddp[recomputed]
    else:
        width = 2.0 if settings.engine.precision == "fp16" else 4.0  # bf16: float32 weights under autocast
        stage, offload, buckets = _deepspeed(strategy)
        share = 1 / processes
        weights = float(width * (trained + frozen))
        # DeepSpeed's optimiser moves a float32 copy of its share, whatever the weights are.
        states, on_host = 3 * FLOAT * trained * share, 0.0
        average *= share
        gradients = width * trained * (share if stage > 1 else 1)
        buffers = width * min(buckets, 3 * (trained + frozen))
        if offload:
            on_host = states + FLOAT * trained * share + average
            states = gradients = average = 0.0
        if stage == 3:
            buffers += width * min(_live_parameters(strategy), trained + frozen)
            weights *= share
        shares = {"parameters": weights, "gradients": gradients, "optimizer": states, "ema": average}
        note = "with plain AdamW: 8-bit Adam runs under ddp only" if settings.optimizer.kind != "adamw" else ""
        activations = measured.zero[recomputed]
    if settings.ema.offload:
        on_host += shares["ema"]
        shares["ema"] = 0.0
    looking = frozen_bytes(settings, measured)
    return StrategyMemory(
        strategy, **shares, buffers=buffers, frozen=looking[0], encoding=looking[1], activations=activations,
        host=on_host, note=note,
    )  # fmt: skip


def adam_bytes(network: nn.Module, kind: str) -> float:
    """States of the optimiser for all trained parameters: two averages, and torch's step number a tensor."""
    sizes = [parameter.numel() for parameter in network.parameters() if parameter.requires_grad]
    if kind == "adamw":
        return float(sum(2 * FLOAT * size + FLOAT for size in sizes))
    of_small = sum(2 * FLOAT * size for size in sizes if size < SMALLEST_8BIT)
    of_large = sum(2 * (size + FLOAT * size / BLOCK_8BIT) for size in sizes if size >= SMALLEST_8BIT)
    return float(of_small + of_large)


def features_are_cached(settings: TrainSettings) -> bool:
    """Whether latents and reference features come from a cache, so that the frozen networks do not look."""
    data = settings.data
    if not data.shards:
        return data.cache_scenes > 0
    return data.cache is not None and not data.toybox.weight  # scenes of the toybox are mixed in live


def frozen_bytes(settings: TrainSettings, measured: Measured) -> tuple[float, float]:
    """Of autoencoder and image tower: weights on the GPU, float32; and what lives while they look at one batch."""
    vae, tower = measured.vae, measured.tower
    if features_are_cached(settings):
        return float(
            FLOAT * vae.parameters
        ), 0.0  # the autoencoder stays for validation, the tower waits in main memory
    work = vae.work_bytes * min(settings.batch_size, vae.pictures_a_call)
    weights = FLOAT * vae.parameters
    if tower is not None:
        weights += FLOAT * tower.parameters
        work = max(work, tower.work_bytes * tower.pictures_a_call)
    return float(weights), float(work)


def _counts(network: nn.Module) -> tuple[int, int]:
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in network.parameters()) - trained


def _castable(network: nn.Module) -> int:
    """Frozen weights that `network_options.hold_frozen_weights_in` keeps in half precision."""
    parts = [module for name, module in network.named_children() if name in ("unet", "text_encoder")]
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    return sum(layer.weight.numel() for layer in layers if not layer.weight.requires_grad)


def _deepspeed(strategy: str) -> tuple[int, bool, int]:
    """Stage, whether the optimiser is in main memory, and elements of the buffers of communication."""
    zero = _zero_options(strategy)
    reduce = zero["reduce_bucket_size"] * (2 if zero.get("overlap_comm") else 1)
    gather = zero.get("allgather_bucket_size", 0) + zero.get("stage3_prefetch_bucket_size", 0)
    return zero["stage"], "offload_optimizer" in zero, reduce + gather


def _live_parameters(strategy: str) -> int:
    return int(_zero_options(strategy)["stage3_max_live_parameters"])


def _zero_options(strategy: str) -> dict[str, int]:
    file = REPOSITORY / "configs" / "deepspeed" / f"{strategy}.json"
    options: dict[str, int] = json.loads(file.read_text())["zero_optimization"]
    return options


def columns(rows: Sequence[StrategyMemory], batch_size: int) -> list[tuple[str, list[float]]]:
    """What a table shows, in bytes: heading, then one value a strategy."""
    return [
        ("weights", [row.parameters for row in rows]),
        ("gradients", [row.gradients for row in rows]),
        ("optimiser", [row.optimizer for row in rows]),
        ("EMA", [row.ema for row in rows]),
        ("buffers", [row.buffers for row in rows]),
        ("frozen", [row.frozen for row in rows]),
        ("activ.", [FRAGMENTS * max(row.activations.of(batch_size), row.encoding) for row in rows]),
        ("sum", [row.total(batch_size) for row in rows]),
    ]
