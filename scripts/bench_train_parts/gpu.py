"""A whole step of the subject model on a GPU: images/s, memory and the share of the peak, by batch size.

The trainer's own pieces from a finished batch on: draws, autocast, both losses, backward, clipping, AdamW, running
average. Latents and image features are random numbers, as if cached; weights too. FLOPs are those that were run, each
once (train/engine/throughput.py), and the peak is the maker's for dense products (train/engine/gpus.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import nn

from model.composition import SubjectDiffusionModel
from model.inputs import SubjectInputs
from train.data.diffusion_batch import DiffusionBatch
from train.draws import SampleDraws
from train.engine.averaging import AveragedWeights
from train.engine.optimizers import build_optimizer
from train.engine.strategies import finish_step, open_accelerator, prepare
from train.engine.throughput import StepFlops, peak_flops, peak_memory_gb
from train.network_options import apply_engine
from train.plan.networks import BatchShape, batch_shape, build_networks
from train.settings import TrainSettings
from train.tasks.subject import SubjectTraining

from . import turns

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
STEPS_A_READING = 3
SD_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WITHOUT = ", no attention loss"
SUPERVISED = (10, 12)  # places in the prompt of the first subject's noun and placeholder; the next has its own 6 later


def gpu_settings(subjects: int) -> TrainSettings:
    """SD 2.1 at 512 px in bf16, one reference a subject, compiled."""
    return TrainSettings.model_validate(
        {
            "task": "subject",
            "name": "bench",
            "model": "configs/model/sd21.yaml",
            "steps": 10**6,
            "batch_size": 1,
            "data": {
                "size": 512,
                "max_subjects": subjects,
                "toybox": {"min_subjects": 0, "max_subjects": subjects},
                "references": {"source": "same_image"},
            },
            "optimizer": {"learning_rate": 3e-5},
            "engine": {"precision": "bf16", "compile": True},
        }
    )


@dataclass
class SubjectStep:
    """The subject model in training, on the device that accelerate finds."""

    settings: TrainSettings
    accelerator: Accelerator
    training: SubjectTraining
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedWeights
    shape: BatchShape
    done: int = 0
    flops: dict[int, float] = field(default_factory=dict)  # of a step, by batch size

    @classmethod
    def of(cls, settings: TrainSettings) -> SubjectStep:
        accelerator = open_accelerator(settings)
        if accelerator.device.type == "cuda" and settings.engine.tf32:
            torch.set_float32_matmul_precision("high")
        torch.manual_seed(settings.seed)
        with torch.device(accelerator.device):
            networks = build_networks(settings)
        model = networks.trainable
        assert isinstance(model, SubjectDiffusionModel)
        apply_engine(settings.engine, model.unet, model.text_encoder)
        training = SubjectTraining(model, DDPMScheduler(**SD_SCHEDULE), settings.diffusion).train()
        if settings.engine.channels_last:
            training = training.to(memory_format=torch.channels_last)
        wrapped, optimizer = prepare(accelerator, training, build_optimizer(training, settings.optimizer))
        average = AveragedWeights(training, settings.ema)
        return cls(settings, accelerator, training, wrapped, optimizer, average, batch_shape(settings, networks))

    @property
    def adapter_config(self) -> Any:
        adapter = self.training.adapter
        assert adapter is not None, "the subject model has one"
        return adapter.config

    def run(self, batch: DiffusionBatch) -> None:
        """One step, as train/loop.py does it."""
        size = len(batch.latents)
        draws = SampleDraws(self.settings.seed, self.done, range(self.done * size, (self.done + 1) * size))
        with self.accelerator.accumulate(self.wrapped), self.accelerator.autocast():
            loss, _ = self.wrapped(batch, draws, self.done)
            self.accelerator.backward(loss)
        _, applied = finish_step(
            self.accelerator, self.wrapped, self.optimizer, self.settings.optimizer.max_grad_norm
        )  # fmt: skip
        if not applied:
            raise RuntimeError("gpu: gradients were not finite; a step without its optimiser is none to be timed")
        self.average.update(self.done)
        self.done += 1

    def count_flops(self, batch: DiffusionBatch) -> float:
        """Of one step with this batch; runs it."""
        counter = StepFlops()
        with counter.counting():
            self.run(batch)
        assert counter.total is not None
        return float(counter.total)

    @contextmanager
    def without_attention_loss(self) -> Iterator[None]:
        whole = self.training.settings
        self.training.settings = whole.model_copy(update={"attention_loss_weight": 0.0})
        try:
            yield
        finally:
            self.training.settings = whole

    def random_batch(self, size: int) -> DiffusionBatch:
        """Full: every sample has all subjects that the settings allow, with all references."""
        shape, training, device = self.shape, self.training, self.accelerator.device
        config, text = self.adapter_config, training.text_encoder.config
        subjects, references, side = shape.subjects, shape.references, shape.latent_side
        length, vocabulary = text.max_position_embeddings, text.vocab_size
        ids = torch.randint(vocabulary - 2, (size, length), device=device)
        empty = torch.full_like(ids, vocabulary - 1)
        places = SUPERVISED[1] + 6 * torch.arange(subjects, device=device).expand(size, -1)  # (B, S)
        supervised = torch.zeros(size, subjects, length, device=device)
        for place in (places, places - SUPERVISED[1] + SUPERVISED[0]):
            supervised.scatter_(2, place[..., None], 0.5)
        left = torch.arange(subjects, device=device) / subjects  # (S,)
        corners = (left, torch.full_like(left, 0.2), left + 0.9 / subjects, torch.full_like(left, 0.8))
        masks = torch.zeros(size, subjects, 16, 16, device=device)
        masks[:, :, 4:12, 4:12] = 1
        random = partial(torch.randn, device=device)
        pooled = random(size, subjects, references, config["pooled_dim"])
        inputs = SubjectInputs(
            input_ids=ids.scatter(1, places, vocabulary),
            plain_input_ids=ids,
            empty_input_ids=empty,
            placeholder_positions=places,
            noun_ids=torch.full((size, subjects, 1), 5, device=device),
            pooled=pooled.mean(dim=2),
            patches=random(size, subjects, references, config["num_patches"], config["patch_dim"]),
            reference_keep=torch.ones(size, subjects, references, dtype=torch.bool, device=device),
            subject_keep=torch.ones(size, subjects, dtype=torch.bool, device=device),
            boxes=torch.stack(corners, dim=-1).expand(size, -1, -1),
            location_keep=torch.ones(size, dtype=torch.bool, device=device),
            strength=torch.ones(size, subjects, device=device),
        )
        latents = random(size, shape.channels, side, side)
        return DiffusionBatch(latents, inputs, pooled, masks, supervised)


def measure_size(step: SubjectStep, size: int, rounds: int) -> turns.Table:
    """One table of a batch size: compiled and not, with the attention-map loss and without."""
    batch, device = step.random_batch(size), step.accelerator.device

    def steps(compiled: bool, attention: bool) -> None:
        with torch.compiler.set_stance("default" if compiled else "force_eager"):
            for _ in range(STEPS_A_READING):
                if attention:
                    step.run(batch)
                else:
                    with step.without_attention_loss():
                        step.run(batch)

    works: dict[str, turns.Work] = {}
    for compiled in (False, True) if step.settings.engine.compile else (False,):
        for attention in (True, False):
            name = ("compiled" if compiled else "eager") + ("" if attention else WITHOUT)
            works[name] = partial(steps, compiled, attention)
    flops, memory, peak = step.count_flops(batch), {}, peak_flops(device, step.settings.engine)
    for name, work in works.items():
        work()  # compiles
        turns.wait_for(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        work()
        turns.wait_for(device)
        memory[name] = peak_memory_gb(device)
    rows: dict[str, dict[str, float]] = {}
    for name, taken in turns.median_seconds(works, rounds, device).items():
        seconds = taken.wall / STEPS_A_READING
        rows[name] = {
            "images/s": size / seconds,
            "ms a step": 1000 * seconds,
            "memory GB": memory[name],
            "TFLOP/s": flops / seconds / 1e12,
        }
        if peak is not None:
            rows[name]["MFU"] = flops / seconds / peak
    for row in rows.values():
        row["ratio"] = row["ms a step"] / rows["eager"]["ms a step"]
    return turns.Table("gpu", f"{_shapes(step)}, batch {size}", rows)


def measure_sizes(settings: TrainSettings, sizes: Sequence[int], rounds: int) -> Iterator[turns.Table]:
    """A table for each batch size that fits, then the bar."""
    step = SubjectStep.of(settings)
    shares: dict[str, float] = {}
    for size in sizes:
        try:
            table = measure_size(step, size, rounds)
        except torch.OutOfMemoryError:
            print(f"gpu: a batch of {size} does not fit into the memory of this GPU", flush=True)
            break
        shares |= {f"{name}, batch {size}": row["MFU"] for name, row in table.rows.items() if "MFU" in row}
        yield table
    if not shares:
        yield turns.Table("gpu", "the peak of this device is not known: no share of it, no bar", {})
        return
    best = max((name for name in shares if WITHOUT not in name), key=lambda name: shares[name])
    yield turns.Table(
        "gpu", "best of all sizes", {}, (turns.Bar(f"share of the peak (MFU), {best}", shares[best], 0.3, True),)
    )


def bench_gpu(options: argparse.Namespace) -> Iterator[turns.Table]:
    """SD 2.1 at 512 px, batches of 1 to 32."""
    yield from measure_sizes(gpu_settings(options.subjects), BATCH_SIZES, options.rounds)


def _shapes(step: SubjectStep) -> str:
    shape, config, device = step.shape, step.adapter_config, step.accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    widths: Any = step.training.unet.config.block_out_channels
    return (
        f"{name}; UNet {'/'.join(map(str, widths))}, text encoder, adapter; {step.settings.engine.precision} autocast, "
        f"latents {shape.channels}x{shape.latent_side}x{shape.latent_side}, {shape.subjects} subjects of "
        f"{shape.references} x {config['num_patches']} tokens"
    )
