"""What refining costs: the loop around its arithmetic, and LASR's text encoder in every cross-attention layer.

    python scripts/bench_refine.py
    python scripts/bench_refine.py --only loop --methods lasr lora --rounds 7
    python scripts/bench_refine.py --only layers --size sd21 --batch 2

What one table compares runs in one process, turn about; ratios are of medians. Beside each bar stands met or MISSED.

    loop    `refine` at toybox size against forward, backward and optimiser on the same batches in memory; pictures
            that a method asks for in a new size each time go through the autoencoder in both
    layers  seconds of a cross-attention layer's own context, LASR's modes against one plain text-encoder call; at
            toybox size and at SD 2.1's text encoder (random weights), whose UNet only lends its shapes
    score   what fast mode loses: denoising error of a tuned word along the steps of a generation, in both modes

LASR: github.com/askerlee/AdaFace-dev; its modes: model/lasr/adaptive_prompts.py.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from data_pipeline.arguments import positive
from data_pipeline.errors import CommandParser, run_command
from data_pipeline.machine import processor_name
from data_pipeline.settings import settings_of
from data_pipeline.toybox.archive import SubjectArchive
from infer.loading import hush_libraries, load_base
from infer.refine.command import run_settings
from infer.refine.method import RefineBatch, denoising_error
from infer.refine.methods import METHODS
from infer.refine.samples import CollatedSamples
from infer.refine.settings import RefineSettings
from infer.refine.task import RefineTask, method_settings
from infer.refine.words import prompt_inputs
from model.attention_maps import cross_attention_layers
from model.lasr.adaptive_embedding import AdaptiveEmbedding
from model.lasr.layerwise_basis import LayerwiseBasis
from model.lasr.static_embedding import StaticEmbedding
from model.layer_contexts import LayerContexts, encode_layer_contexts
from model.learned_words import LearnedWord, LearnedWords, Mode
from model.text_fusion import PromptEmbeddings
from train.draws import SampleDraws
from train.engine.optimizers import build_optimizer
from train.loop import run_loop
from train.settings import load_model_settings

if (root := str(Path(__file__).resolve().parent.parent)) not in sys.path:
    sys.path.insert(0, root)  # started as a file, Python sees its folder alone

from scripts.bench_train_parts import turns

LOOP_BAR, EXACT_BAR, FAST_BAR = 0.05, 1.0, 0.4
NEVER = 10**9
PICTURES = 4  # of the subject
WARM_UP = 2  # steps of a run that do not count
TUNING_STEPS, DRAWING_STEPS, SEEDS = 40, 20, 4  # of `score`
PROMPT = "a {} on the beach"
SD21 = Path("configs/model/sd21.yaml")
NAMES = {"toybox": "toybox", "sd21": "Stable Diffusion 2.1"}
WORD_POSITION = 2  # of PROMPT's word among the tokens


def refine_settings(method: str, folder: Path, options: Mapping[str, Any], steps: int) -> RefineSettings:
    """A run on pictures of a held-out toybox subject; nothing but steps falls into a window."""
    archive = SubjectArchive()
    subject = next(subject for subject in archive.of_split("heldout") if subject.group == "Animals")
    picture = Image.fromarray(archive.cutout(subject.id)).resize((64, 64), Image.Resampling.LANCZOS)
    pictures = folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for index in range(PICTURES):
        picture.rotate(5 * index).save(pictures / f"{index}.png")
    told = {
        "method": method,
        "concepts": {"z": {"images": [pictures], "class_word": subject.noun}},
        "output": folder / f"{method}.safetensors",
        "options": {"steps": steps, **options},
        "runs_dir": folder / "runs",
        "report": {"log_every": 10, "checkpoint_every": NEVER, "preview_prompts": ["{}"], "preview_steps": 1},
    }
    return settings_of(RefineSettings, told, "bench_refine")


# --- loop


@dataclass(frozen=True)
class Step:
    """What a step took, in seconds."""

    wall: float
    encoding: float  # of it, of the processor's, until its pictures were latents
    processor: float  # of all threads of this process: not longer for what else the machine does


class TimedTask(RefineTask):
    """Reads the clocks whenever the loop asks for a batch, once a step."""

    readings: list[Step]

    def batch(self, collated: CollatedSamples) -> RefineBatch:
        turns.wait_for(self.device)
        wall, processor = time.perf_counter(), time.process_time()
        batch = super().batch(collated)
        turns.wait_for(self.device)
        self.readings.append(Step(wall, time.process_time() - processor, processor))
        return batch


def timed_task(settings: RefineSettings, device: torch.device) -> TimedTask:
    task = TimedTask(settings, method_settings(settings), device)
    task.readings = []
    return task


def tuned(settings: RefineSettings) -> TimedTask:
    """The loop that `refine` runs, from nothing to the end."""
    tasks: list[TimedTask] = []

    def begin(device: torch.device) -> TimedTask:
        tasks.append(timed_task(settings, device))
        return tasks[0]

    run = run_settings(settings, method_settings(settings))
    shutil.rmtree(run.folder, ignore_errors=True)
    with redirect_stdout(sys.stderr):
        run_loop(run, begin)
    return tasks[0]


def steps_of_refine(settings: RefineSettings) -> list[Step]:
    return _between(tuned(settings).readings)


def steps_of_bare_loop(settings: RefineSettings) -> list[Step]:
    """Forward, backward and optimiser alone on the batches of `steps_of_refine`, which lie ready in memory.

    Pictures in a new size are part of the method, in the published code too: they are encoded here, all in one call.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = method_settings(settings)
    run = run_settings(settings, own)
    torch.manual_seed(run.seed)
    with redirect_stdout(sys.stderr):
        task = timed_task(settings, device)
    module, size = task.module, own.batch_size
    optimizer = build_optimizer(module, run.optimizer)
    numbers = [range(step * size, (step + 1) * size) for step in range(own.steps)]
    collated = [task.collate([task.dataset[number] for number in each]) for each in numbers]
    batches = [task.batch(each) for each in collated]
    readings = []
    for step, (batch, pictures) in enumerate(zip(batches, collated, strict=True)):
        turns.wait_for(device)
        wall, processor = time.perf_counter(), time.process_time()
        if pictures.resized.any():
            fresh = encoded(task.base.pipeline.vae, pictures.pixels[pictures.resized].to(device))
            batch.latents[pictures.resized] = fresh
            turns.wait_for(device)
        readings.append(Step(wall, time.process_time() - processor, processor))
        loss, _ = module(batch, SampleDraws(run.seed, step, numbers[step]), step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return _between(readings)


@torch.no_grad()
def encoded(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Pictures (N, 3, S, S), 0..1 -> scaled latents (N, C, h, w)."""
    latents: Tensor = vae.encode(pixels * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    return latents


def _between(readings: Sequence[Step]) -> list[Step]:
    """Of all steps but the first, in which memory is warmed up, and the last."""
    taken = [
        Step(end.wall - start.wall, start.encoding, end.processor - start.processor)
        for start, end in pairwise(readings)
    ]
    return taken[WARM_UP:]


def bench_loop(options: argparse.Namespace) -> Iterator[turns.Table]:
    """Each method's loop beside its bare one."""
    for method in options.methods:
        found: dict[str, list[Step]] = {"refine": [], "bare loop": []}
        with tempfile.TemporaryDirectory(prefix="bench-refine-") as folder:
            settings = refine_settings(method, Path(folder), {}, options.steps)
            contenders = {"refine": steps_of_refine, "bare loop": steps_of_bare_loop}
            for round_number in range(options.rounds):
                for name in list(contenders)[:: 1 if round_number % 2 == 0 else -1]:
                    found[name] += contenders[name](settings)
            size = method_settings(settings).batch_size
        rows = {
            name: {
                "seconds a step": statistics.median(step.wall for step in steps),
                "CPU seconds": statistics.median(step.processor for step in steps),
                "of it encoding": statistics.median(step.encoding for step in steps),
            }
            for name, steps in found.items()
        }
        share = rows["refine"]["seconds a step"] / rows["bare loop"]["seconds a step"] - 1
        shapes = f"{method}, toybox base, 64 px, batch {size}, {options.steps - 1 - WARM_UP} steps a round"
        yield turns.Table("loop", shapes, rows, (turns.Bar(f"{method}: overhead over a bare loop", share, LOOP_BAR),))


# --- layers


@dataclass(frozen=True)
class LayerWork:
    """Prompts with an adaptive word, and what a UNet pass would hand to its cross-attention layers."""

    text_encoder: CLIPTextModel
    plain_ids: Tensor  # (B, L) of prompts without a learned word
    contexts: LayerContexts
    features: list[Tensor]  # (B, T, C) a layer
    time: Tensor  # (B, width) time embedding

    def plain(self) -> Tensor:
        """The stock text encoder, once."""
        states: Tensor = self.text_encoder(input_ids=self.plain_ids).last_hidden_state
        return states

    def layers(self, contexts: LayerContexts) -> Tensor:
        """Contexts of all layers of one pass; gives the last."""
        now = contexts.at(self.time)
        found = [now(layer, features) for layer, features in enumerate(self.features)]
        return found[-1]


def layer_work(text_encoder: CLIPTextModel, unet: UNet2DConditionModel, batch: int, words_used: int) -> LayerWork:
    """Random prompts of some words, the learned one in the place that `PROMPT` gives it.

    Args:
        unet: only its shapes are read.
        words_used: tokens of the prompt without start and end.
    """
    torch.manual_seed(0)
    config, device = text_encoder.config, text_encoder.device
    layers = [unet.get_submodule(name) for name in cross_attention_layers(unet)]
    widths: list[int] = [layer.to_q.in_features for layer in layers]
    time_width = unet.time_embedding.linear_2.out_features
    start = torch.randn(1, config.hidden_size)

    def basis() -> LayerwiseBasis:
        return LayerwiseBasis(start, torch.zeros(0, config.hidden_size), 3, len(layers), 1)

    static, adaptive = StaticEmbedding(basis(), torch.ones(1)), AdaptiveEmbedding(basis(), widths, time_width)
    words = LearnedWords([LearnedWord("z", [config.vocab_size + 1], static, adaptive)]).to(device)
    words.requires_grad_(False)
    end = config.vocab_size - 1  # the highest id, as in every CLIP vocabulary; pads too
    ids = torch.full((batch, config.max_position_embeddings), end)
    ids[:, : words_used + 1] = torch.randint(1, end, (batch, words_used + 1))
    ids = ids.to(device)
    named = ids.clone()
    named[:, WORD_POSITION] = config.vocab_size + 1
    embedded = PromptEmbeddings(text_encoder.embeddings.token_embedding(ids))
    with torch.no_grad():
        contexts = encode_layer_contexts(text_encoder, words, layers, named, embedded)
    features = [torch.randn(batch, 64, width, device=device) for width in widths]
    return LayerWork(text_encoder, ids, contexts, features, torch.randn(batch, time_width, device=device))


def sized(size: str) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    """The shipped networks; at SD 2.1's size a text encoder with random weights, and a UNet without any."""
    if size == "toybox":
        shipped = load_base("toybox")
        return shipped.text_encoder.eval().requires_grad_(False), shipped.unet
    told = load_model_settings(SD21).architecture
    text_encoder = CLIPTextModel(CLIPTextConfig(**told["text_encoder"])).eval().requires_grad_(False)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**told["unet"])
    return text_encoder, unet


def bench_layers(options: argparse.Namespace) -> Iterator[turns.Table]:
    """Both modes at both sizes."""
    for size in options.size:
        text_encoder, unet = sized(size)
        work = layer_work(text_encoder, unet, options.batch, len(PROMPT.split()))
        fast = replace(work.contexts, mode="fast", previous={})
        works: dict[str, turns.Work] = {
            "plain text encoder": work.plain,
            "exact": partial(work.layers, work.contexts),
            "fast": partial(work.layers, fast),  # the call before the clock starts is the first pass
        }
        with torch.no_grad():
            taken = turns.median_seconds(works, options.rounds, text_encoder.device)
        count = len(work.features)
        rows = {
            name: {"seconds a layer": each.wall / (1 if name.startswith("plain") else count)}
            for name, each in taken.items()
        }
        plain = rows["plain text encoder"]["seconds a layer"]
        for row in rows.values():
            row["of a plain call"] = row["seconds a layer"] / plain
        bars = [
            turns.Bar(f"{NAMES[size]}, {mode}: plain calls a layer", rows[mode]["of a plain call"], limit)
            for mode, limit in (("exact", EXACT_BAR), ("fast", FAST_BAR))
        ]
        prompts = f"{options.batch} prompt(s) like '{PROMPT.format('z')}'"
        shapes = f"{NAMES[size]}, {count} cross-attention layers, {prompts}, {text_encoder.config.hidden_size} wide"
        yield turns.Table("layers", shapes, rows, tuple(bars))


# --- score


@torch.no_grad()
def errors_on_the_way(task: RefineTask, mode: Mode, seed: int, steps: int) -> list[float]:
    """Denoising error of the first picture at each step of a generation, from the noisiest on: fast mode looks back."""
    pipeline, scheduler = task.base.pipeline, task.base.pipeline.scheduler
    assert pipeline.words is not None
    pipeline.words.mode = mode
    batch = task.batch(task.collate([task.dataset[0]]))
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(seed)).to(batch.latents)
    model = pipeline.subject_model
    inputs = prompt_inputs(pipeline, [PROMPT.format("z")])
    context, condition = model.encode(inputs, (noise.shape[2], noise.shape[3]), inference=True)
    scheduler.set_timesteps(steps)
    found = []
    for timestep in scheduler.timesteps.to(noise.device):
        when = timestep[None]  # (1,)
        noisy = scheduler.add_noise(batch.latents, noise, when)
        prediction = model.denoise(noisy, when, context, condition)
        found.append(float(denoising_error(scheduler, prediction, batch, noise, when)))
    return found


def bench_score(options: argparse.Namespace) -> Iterator[turns.Table]:
    """A word of a few steps, drawn with in both modes from the same noises."""
    with tempfile.TemporaryDirectory(prefix="bench-refine-") as folder:
        tuning = {"warmup_steps": 0, "learning_rate": 5e-3, "variation": {"flip": 0, "shrink": 0}}
        settings = refine_settings("lasr", Path(folder), tuning, options.tuning_steps)
        task = tuned(settings)
        modes: tuple[Mode, ...] = ("exact", "fast")
        rows: dict[str, dict[str, float]] = {}
        for mode in modes:
            errors = [errors_on_the_way(task, mode, seed, DRAWING_STEPS) for seed in range(SEEDS)]
            rows[mode] = {"error": sum(map(sum, errors)) / (SEEDS * DRAWING_STEPS)}
    for row in rows.values():
        row["ratio"] = row["error"] / rows["exact"]["error"]
    shapes = (
        f"lasr after {options.tuning_steps} steps, toybox base, {SEEDS} noises, {DRAWING_STEPS} steps of a generation"
    )
    yield turns.Table("score", shapes, rows)


PARTS = {"loop": bench_loop, "layers": bench_layers, "score": bench_score}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser("bench_refine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.prog = "scripts/bench_refine.py"
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), metavar="PART")
    parser.add_argument("--rounds", type=positive, default=5, help="medians are taken over them")
    parser.add_argument("--steps", type=positive, default=24, help="loop: of a run")
    methods = ("textual-inversion", "custom-diffusion", "lasr")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=methods, metavar="METHOD", help="loop: of which"
    )
    parser.add_argument("--size", nargs="+", choices=tuple(NAMES), default=tuple(NAMES), help="layers: of which models")
    parser.add_argument("--batch", type=positive, default=1, help="layers: prompts at once")
    parser.add_argument("--tuning-steps", type=positive, default=TUNING_STEPS, help="score: of the word")
    options = parser.parse_args(arguments)
    hush_libraries()
    print(f"{processor_name()}, {torch.get_num_threads()} threads; medians of {options.rounds} rounds", flush=True)
    for name in options.only:
        for table in PARTS[name](options):
            print(table, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
