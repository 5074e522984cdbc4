"""Draw a contact sheet of the toybox: scenes with their true boxes, captions and separately rendered references.

python scripts/toybox_contact_sheet.py --output docs/images/toybox.png
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.toybox.world import ToyboxEntity, ToyboxScene, ToyboxWorld

SCENE, REFERENCE, GAP = 192, 44, 14  # pixels
TEXT_HEIGHT = 50
COLOURS = ("#e6194b", "#1f77d0", "#f58231", "#2ca02c")
BACKGROUND, INK = "#ffffff", "#333333"


def reference_tile(entity: ToyboxEntity, number: int) -> Image.Image:
    """One reference on mid-grey or on its background."""
    rgba, behind = entity.references[number], entity.reference_backgrounds[number]
    frame = np.full((*rgba.shape[:2], 3), 127, np.uint8) if behind is None else behind
    tile = Image.fromarray(frame)
    tile.paste(Image.fromarray(rgba), mask=Image.fromarray(rgba[..., 3]))
    return tile.resize((REFERENCE, REFERENCE), Image.Resampling.LANCZOS)


def scene_card(scene: ToyboxScene) -> Image.Image:
    """Scene with boxes, a column of references (framed in the colour of their box), caption below."""
    card = Image.new("RGB", (SCENE + 6 + REFERENCE, SCENE + TEXT_HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(card)
    card.paste(Image.fromarray(scene.image), (0, 0))
    for i, entity in enumerate(scene.entities):
        colour = COLOURS[i % len(COLOURS)]
        x0, y0, x1, y1 = entity.box_xyxy_px
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=2)
        top = i * (REFERENCE + 5)
        card.paste(reference_tile(entity, 0), (SCENE + 6, top))
        draw.rectangle((SCENE + 6, top, SCENE + 5 + REFERENCE, top + REFERENCE - 1), outline=colour, width=2)
    lines = textwrap.wrap(scene.caption, 42)[:3]
    draw.multiline_text((0, SCENE + 4), "\n".join(lines), fill=INK, font=ImageFont.load_default(12), spacing=2)
    return card


def chosen_scenes(count: int) -> list[ToyboxScene]:
    """The first `count` training scenes that hold subjects, each on another background."""
    world = ToyboxWorld(size=SCENE, reference_size=96, seed=3)
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
    arguments = parser.parse_args()
    cards = [scene_card(scene) for scene in chosen_scenes(arguments.columns * arguments.rows)]
    width, height = cards[0].width + GAP, cards[0].height + GAP
    sheet = Image.new("RGB", (arguments.columns * width + GAP, arguments.rows * height + GAP), BACKGROUND)
    for i, card in enumerate(cards):
        sheet.paste(card, (GAP + (i % arguments.columns) * width, GAP + (i // arguments.columns) * height))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(arguments.output, optimize=True)
    print(f"{arguments.output}: {len(cards)} scenes, {arguments.output.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
