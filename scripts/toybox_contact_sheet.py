"""Draw a contact sheet of the toybox: scenes with their true boxes, captions and separately rendered references.

python scripts/toybox_contact_sheet.py --output docs/images/toybox.png

A box, the reference beside the scene and the noun in the caption have one colour where they belong to one entity.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.toybox.world import ToyboxEntity, ToyboxScene, ToyboxWorld

SCENE, REFERENCE, GAP = 192, 44, 20  # pixels
LINE_HEIGHT, LINES = 17, 3  # of the caption
COLOURS = ("#e6194b", "#1f6fd0", "#d9730d", "#2a922a")
BACKGROUND, INK, EDGE = "#ffffff", "#444444", "#bbbbbb"
FONT = ImageFont.load_default(13)


def reference_tile(entity: ToyboxEntity, number: int) -> Image.Image:
    """One reference on mid-grey or on its background."""
    rgba, behind = entity.references[number], entity.reference_backgrounds[number]
    frame = np.full((*rgba.shape[:2], 3), 127, np.uint8) if behind is None else behind
    tile = Image.fromarray(frame)
    tile.paste(Image.fromarray(rgba), mask=Image.fromarray(rgba[..., 3]))
    return tile.resize((REFERENCE, REFERENCE), Image.Resampling.LANCZOS)


def write_caption(draw: ImageDraw.ImageDraw, scene: ToyboxScene, top: float, width: float) -> None:
    """The caption in lines of at most `width` pixels, each entity's noun in its colour."""
    x, y = 0.0, top
    for word in re.finditer(r"\S+", scene.caption):
        if x and x + FONT.getlength(word.group()) > width:
            x, y = 0.0, y + LINE_HEIGHT
        # A comma after a noun is not of it, so a word may have two colours.
        for part in re.finditer(r"[^,]+|,", word.group()):
            start = word.start() + part.start()
            owner = next((i for i, e in enumerate(scene.entities) if e.span[0] <= start < e.span[1]), None)
            colour = INK if owner is None else COLOURS[owner % len(COLOURS)]
            draw.text((x, y), part.group(), fill=colour, font=FONT, stroke_width=0 if owner is None else 0.3)
            x += FONT.getlength(part.group())
        x += FONT.getlength(" ")


def scene_card(scene: ToyboxScene) -> Image.Image:
    """Scene with boxes, a column of references (framed in the colour of their box), caption below."""
    card = Image.new("RGB", (SCENE + 6 + REFERENCE, SCENE + 6 + LINES * LINE_HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(card)
    card.paste(Image.fromarray(scene.image), (0, 0))
    draw.rectangle((0, 0, SCENE - 1, SCENE - 1), outline=EDGE)
    for i, entity in enumerate(scene.entities):
        colour = COLOURS[i % len(COLOURS)]
        x0, y0, x1, y1 = entity.box_xyxy_px
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=2)
        top = i * (REFERENCE + 5)
        card.paste(reference_tile(entity, 0), (SCENE + 6, top))
        draw.rectangle((SCENE + 6, top, SCENE + 5 + REFERENCE, top + REFERENCE - 1), outline=colour, width=2)
    write_caption(draw, scene, SCENE + 5, card.width)
    return card


def chosen_scenes(count: int, seed: int) -> list[ToyboxScene]:
    """The first `count` training scenes that hold subjects, each on another background."""
    world = ToyboxWorld(size=SCENE, reference_size=96, seed=seed)
    found: dict[str, ToyboxScene] = {}
    index = 0
    while len(found) < count:
        scene = world.scene(index)
        if scene.entities and scene.background not in found:
            found[scene.background] = scene
        index += 1
    return list(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images/toybox.png"))
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--seed", type=int, default=12, help="of the world")
    arguments = parser.parse_args()
    cards = [scene_card(scene) for scene in chosen_scenes(arguments.columns * arguments.rows, arguments.seed)]
    width, height = cards[0].width + GAP, cards[0].height + GAP
    sheet = Image.new("RGB", (arguments.columns * width + GAP, arguments.rows * height + GAP), BACKGROUND)
    for i, card in enumerate(cards):
        sheet.paste(card, (GAP + (i % arguments.columns) * width, GAP + (i // arguments.columns) * height))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.output, optimize=True)
    print(f"{arguments.output}: {len(cards)} scenes, {arguments.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
