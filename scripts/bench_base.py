"""How well the plain base follows its captions: background, count and group word, beside real renders and chance.

    python scripts/bench_base.py
    python scripts/bench_base.py --base FOLDER --sheet docs/images/base.png

Stock `StableDiffusionPipeline`. background, count: captions of scenes of validation families, as they fall; whether the
painting that is nearest outside of all that the segmenter sees is the one asked for, and whether it sees as many things
as were asked for. group word: captions of one thing called an animal, a vehicle …, equally many of each; whether the
identity judge finds the largest thing most like one of that group, among renders of all training subjects of these
groups. Chance is what the same pictures score against the captions of all the others. Below the table stands how much
larger the denoising error becomes where a thing stands if its caption calls it something else: what the words add. The
sheet shows the first captions as they fall, nothing picked: real render, then what the base draws.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional

from data_pipeline.arguments import png_file, positive
from data_pipeline.errors import CommandParser, run_command
from data_pipeline.machine import processor_name
from data_pipeline.toybox.archive import SubjectArchive
from data_pipeline.toybox.world import ToyboxScene, ToyboxWorld
from infer.evaluate.judges import Judges, boxes_of_things
from infer.evaluate.metrics.toybox import small_picture
from infer.evaluate.toybox_truth import BackgroundJudge, seen_in_a_scene
from infer.loading import SHIPPED, hush_libraries, load_base
from train.data.scenes import as_tensor
from train.denoising import sample_errors
from train.starting_models import noise_schedule

GROUPS = ("animal", "food item", "vehicle", "garment", "plant", "clock", "building", "tool", "drink", "fruit")
TILE, GAP, TEXT, COLUMNS, SHOWN = 96, 6, 40, 6, 24  # pixels, tiles
BATCH = 50
NOISE = 0.7  # share of the timesteps: there a thing is hardly seen, and the words decide
HEADING = "| | background | count | group word |\n|---|---|---|---|"


@dataclass(frozen=True)
class Seen:
    """What the judges see in pictures."""

    backgrounds: list[str]
    counts: list[int]
    groups: list[str]  # of the largest thing; "": nothing is seen


class Eyes:
    """Segmenter, background judge, and the identity judge among all things of the groups."""

    def __init__(self, seed: int) -> None:
        self.judges, self.backgrounds = Judges.load(SHIPPED / "toybox" / "judges"), BackgroundJudge()
        archive, rng = SubjectArchive(), np.random.default_rng(seed)
        known = [subject for subject in archive.of_split("train") if subject.group_word in GROUPS]
        views, boxes = zip(*(seen_in_a_scene(archive.cutout(subject.id), rng) for subject in known), strict=True)
        self.groups = [subject.group_word for subject in known]
        self.codes = self.judges.describe(torch.stack(views), torch.stack(boxes))  # (K, D)

    def see(self, pictures: Sequence[Image.Image]) -> Seen:
        tensors = torch.stack([small_picture(picture) for picture in pictures])  # (N, 3, H, W)
        things = [boxes_of_things(mask) for mask in self.judges.subject_masks(tensors)]
        backgrounds = [self.backgrounds.name(one, boxes) for one, boxes in zip(tensors, things, strict=True)]
        largest = torch.tensor([boxes[0] if boxes else (0.0, 0.0, 1.0, 1.0) for boxes in things])  # (N, 4)
        nearest = (self.judges.describe(tensors, largest) @ self.codes.T).argmax(dim=1).tolist()
        groups = [self.groups[i] if boxes else "" for i, boxes in zip(nearest, things, strict=True)]
        return Seen(backgrounds, [len(boxes) for boxes in things], groups)


def scenes_of_groups(seed: int, each: int) -> list[ToyboxScene]:
    """Scenes of one thing that the caption calls by its group word, `each` of every group."""
    world = ToyboxWorld("train", seed=seed, min_subjects=1, max_subjects=1, procedural_share=0, group_share=1)
    scenes: dict[str, list[ToyboxScene]] = {word: [] for word in GROUPS}
    index = 0
    while any(len(found) < each for found in scenes.values()):
        scene = world.scene(index)
        word = scene.entities[0].noun if scene.entities else ""
        if len(scenes.get(word, range(each))) < each:
            scenes[word].append(scene)
        index += 1
    return [scene for found in scenes.values() for scene in found]


def share(found: Sequence[object], asked: Sequence[object]) -> float:
    return float(np.mean([a == b for a, b in zip(found, asked, strict=True)]))


def chance(found: Sequence[object], asked: Sequence[object]) -> float:
    """What `found` would score if every picture was held against each of the captions in turn."""
    return float(np.mean([a == b for a in found for b in asked]))


def called_otherwise(scene: ToyboxScene) -> str:
    """The caption with the next group's word in place of its own."""
    word = scene.entities[0].noun
    other = GROUPS[(GROUPS.index(word) + 1) % len(GROUPS)]
    caption = re.sub(rf"\ban? {word}\b", f"{'an' if other[0] in 'aeiou' else 'a'} {other}", scene.caption)
    return caption.replace(word, other)  # a colour before it has the article


@torch.no_grad()
def price_of_a_wrong_word(pipeline: StableDiffusionPipeline, scenes: Sequence[ToyboxScene], seed: int) -> float:
    """Denoising error inside the masks under the wrong words, as a share of that under the right ones, less 1."""
    schedule = noise_schedule(pipeline.scheduler)
    pictures = torch.stack([as_tensor(scene.image) for scene in scenes]) * 2 - 1  # (N, 3, H, W)
    masks = torch.stack([torch.from_numpy(scene.entities[0].mask)[None].float() for scene in scenes])  # (N, 1, H, W)
    latents = pipeline.vae.encode(pictures.to(pipeline.vae.dtype)).latent_dist.mean * pipeline.vae.config.scaling_factor
    inside = functional.adaptive_avg_pool2d(masks, (latents.shape[2], latents.shape[3]))  # (N, 1, h, w)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    timesteps = torch.full((len(scenes),), int(NOISE * schedule.config.num_train_timesteps))
    noisy = schedule.add_noise(latents, noise, timesteps)
    errors = []
    for captions in ([scene.caption for scene in scenes], [called_otherwise(scene) for scene in scenes]):
        context, _ = pipeline.encode_prompt(captions, "cpu", 1, False)
        predicted = pipeline.unet(noisy, timesteps, context).sample
        errors.append(sample_errors(schedule, predicted, latents, noise, timesteps, inside).sum())
    return float(errors[1] / errors[0]) - 1


def row(name: str, shares: Sequence[float]) -> str:
    return f"| {name} | {' | '.join(f'{value:.2f}' for value in shares)} |"


def draw(
    pipeline: StableDiffusionPipeline, scenes: Sequence[ToyboxScene], seed: int, steps: int, guidance: float
) -> list[Image.Image]:
    drawn: list[Image.Image] = []
    for first in range(0, len(scenes), BATCH):
        numbers = range(first, min(first + BATCH, len(scenes)))
        drawn += pipeline(
            [scenes[i].caption for i in numbers], num_inference_steps=steps, guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed + i) for i in numbers],
        ).images  # fmt: skip
    return drawn


def sheet(scenes: Sequence[ToyboxScene], drawn: Sequence[Image.Image], path: Path) -> None:
    """Real render and drawn picture side by side, the caption below."""
    width, height = 2 * TILE + 2 * GAP, TILE + TEXT
    canvas = Image.new("RGB", (COLUMNS * width + GAP, -(-len(scenes) // COLUMNS) * height + GAP), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(10)
    for number, (scene, picture) in enumerate(zip(scenes, drawn, strict=True)):
        left, top = GAP + (number % COLUMNS) * width, GAP + (number // COLUMNS) * height
        for i, shown in enumerate((Image.fromarray(scene.image), picture)):
            tile = shown.resize((TILE, TILE), Image.Resampling.BICUBIC)
            canvas.paste(tile, (left + i * (TILE + 2), top))
        pen.text((left, top + TILE + 2), "\n".join(textwrap.wrap(scene.caption, 34)[:3]), fill="#333333", font=font)
    canvas.save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser("bench_base", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.prog = "scripts/bench_base.py"
    parser.add_argument("--base", default="toybox", help="shipped name, folder or hub id")
    parser.add_argument("--captions", type=positive, default=200, help="how many of either kind")
    parser.add_argument("--seed", type=int, default=11, help="of the scenes and of the drawing")
    parser.add_argument("--steps", type=positive, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--sheet", type=png_file, help=f"PNG of the first {SHOWN} captions")
    options = parser.parse_args(arguments)
    hush_libraries()
    pipeline = load_base(options.base)
    pipeline.set_progress_bar_config(disable=True)
    world, eyes = ToyboxWorld("val", seed=options.seed), Eyes(options.seed)
    usual = [world.scene(i) for i in range(options.captions)]
    called = scenes_of_groups(options.seed, -(-options.captions // len(GROUPS)))
    drawn, of_groups = (
        draw(pipeline, scenes, options.seed, options.steps, options.guidance) for scenes in (usual, called)
    )
    if options.sheet:
        sheet(usual[:SHOWN], drawn[:SHOWN], options.sheet)
    counts, words = [len(scene.entities) for scene in usual], [scene.entities[0].noun for scene in called]
    places = [scene.background for scene in usual]
    print(HEADING)
    for name, (pictures, things) in {
        "base": (drawn, of_groups),
        "real render": tuple([Image.fromarray(scene.image) for scene in scenes] for scenes in (usual, called)),
    }.items():
        seen, groups = eyes.see(pictures), eyes.see(things).groups
        found = ((seen.backgrounds, places), (seen.counts, counts), (groups, words))
        print(row(name, [share(*pair) for pair in found]))
        if name == "base":
            print(row("base, other captions", [chance(*pair) for pair in found]))
    price = price_of_a_wrong_word(pipeline, called, options.seed)
    print(f"\nerror where the thing stands, under another group's word: {100 * price:+.1f} %")
    print(
        f"{len(usual)} captions as they fall, {len(called)} of one thing; {options.steps} steps, guidance "
        f"{options.guidance:g}; on {processor_name()}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
