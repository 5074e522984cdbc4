"""Draw the first held-out subjects of the archive with the shipped model: reference, then one picture a prompt.

    python scripts/toybox_sheet.py --output docs/images/sheet.png
    python scripts/toybox_sheet.py --subjects penguin turtle watermelon locomotive --output docs/images/demo.png

One seed, one family each, in the archive's order: nothing is picked by its looks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.toybox.archive import SubjectArchive, ToyboxSubject
from infer.pipeline import SubjectDiffusionPipeline
from infer.subjects import Subject

PLACES = ("on the beach", "in the snow", "in front of a brick wall")
BOX = (0.22, 0.22, 0.78, 0.82)
TILE, GAP = 96, 6  # pixels


def chosen(archive: SubjectArchive, names: list[str], count: int) -> list[ToyboxSubject]:
    """The held-out subjects of these names, or the first `count` families."""
    held_out = archive.of_split("heldout")
    if names:
        by_name = {subject.name: subject for subject in held_out}
        return [by_name[name] for name in names]
    first_of = {subject.family: subject for subject in reversed(held_out)}
    return [subject for subject in held_out if first_of[subject.family] is subject][:count]


def draw_row(pipeline: SubjectDiffusionPipeline, archive: SubjectArchive, subject: ToyboxSubject) -> list[Image.Image]:
    """Reference on mid-grey, then the subject in each place."""
    cutout = Image.fromarray(archive.cutout(subject.id))
    reference = Image.new("RGB", cutout.size, (127, 127, 127))
    reference.paste(cutout, mask=cutout)
    prompts = [f"a {subject.noun} {place}" for place in PLACES]
    drawn = pipeline(
        prompts,
        [Subject(subject.noun, [cutout], box=BOX)],
        guidance_scale=3.0,
        subject_guidance_scale=4.0,
        num_inference_steps=50,
        generator=[torch.Generator().manual_seed(2) for _ in prompts],
    ).images
    return [picture.resize((TILE, TILE), Image.Resampling.BICUBIC) for picture in (reference, *drawn)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images/sheet.png"))
    parser.add_argument("--model", default="toybox", help="shipped name or folder")
    parser.add_argument("--base", help="base folder, for trained parts elsewhere")
    parser.add_argument("--subjects", nargs="*", default=[], help="names of held-out subjects")
    parser.add_argument("--count", type=int, default=20, help="subjects, when none are named")
    parser.add_argument("--columns", type=int, default=2, help="subjects side by side")
    arguments = parser.parse_args()
    pipeline = SubjectDiffusionPipeline.from_pretrained(arguments.model, arguments.base)
    pipeline.set_progress_bar_config(disable=True)
    archive = SubjectArchive()
    subjects = chosen(archive, arguments.subjects, arguments.count)
    block = (1 + len(PLACES)) * (TILE + GAP) + 2 * GAP
    rows = -(-len(subjects) // arguments.columns)
    sheet = Image.new("RGB", (arguments.columns * block + GAP, rows * (TILE + GAP) + 24), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for column in range(arguments.columns):
        for i, title in enumerate(("reference", *PLACES)):
            pen.text((GAP + column * block + i * (TILE + GAP), 5), title[:20], fill="#333333", font=font)
    for number, subject in enumerate(subjects):
        left, top = GAP + (number % arguments.columns) * block, 22 + (number // arguments.columns) * (TILE + GAP)
        for i, tile in enumerate(draw_row(pipeline, archive, subject)):
            sheet.paste(tile, (left + i * (TILE + GAP), top))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.output, optimize=True)
    print(f"{arguments.output}: {len(subjects)} subjects")


if __name__ == "__main__":
    main()
