"""Draw the plain base on captions of scenes it never saw, nothing picked: real render, then what it draws.

    python scripts/base_sheet.py --output docs/images/base.png

Stock `StableDiffusionPipeline`; the captions are those of the first validation scenes of a seed, group words and counts
as they fall.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.toybox.world import ToyboxWorld
from infer.loading import hush_libraries, load_base

TILE, GAP, TEXT = 96, 6, 40  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="toybox", help="shipped name, folder or hub id")
    parser.add_argument("--output", type=Path, default=Path("docs/images/base.png"))
    parser.add_argument("--count", type=int, default=24, help="captions")
    parser.add_argument("--columns", type=int, default=6)
    parser.add_argument("--seed", type=int, default=11, help="of the scenes and of the drawing")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=3.0)
    arguments = parser.parse_args()
    hush_libraries()
    pipeline = load_base(arguments.base)
    pipeline.set_progress_bar_config(disable=True)
    world = ToyboxWorld("val", seed=arguments.seed)
    scenes = [world.scene(i) for i in range(arguments.count)]
    drawn = pipeline(
        [scene.caption for scene in scenes],
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance,
        generator=[torch.Generator().manual_seed(arguments.seed + i) for i in range(len(scenes))],
    ).images
    width, height = 2 * TILE + 2 * GAP, TILE + TEXT
    rows = -(-len(scenes) // arguments.columns)
    sheet = Image.new("RGB", (arguments.columns * width + GAP, rows * height + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for number, (scene, picture) in enumerate(zip(scenes, drawn, strict=True)):
        left, top = GAP + (number % arguments.columns) * width, GAP + (number // arguments.columns) * height
        for i, shown in enumerate((Image.fromarray(scene.image), picture)):
            sheet.paste(shown.resize((TILE, TILE), Image.Resampling.BICUBIC), (left + i * (TILE + 2), top))
        pen.text((left, top + TILE + 2), "\n".join(textwrap.wrap(scene.caption, 34)[:3]), fill="#333333", font=font)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.output, optimize=True)
    print(f"{arguments.output}: {len(scenes)} captions")


if __name__ == "__main__":
    main()
