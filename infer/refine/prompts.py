"""Texts that a refinement is trained with: neutral templates for subject or style, and phrases that put it somewhere.

`{}` is the thing: the placeholder, or the class word in the prompts that the composition loss and the regularisation
compare with. Written for this project; a file of one's own templates, one a line, takes their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from data_pipeline.errors import UserError

Kind = Literal["subject", "style"]

SUBJECT_TEMPLATES = (
    "a photo of a {}",
    "a photo of the {}",
    "a picture of a {}",
    "a picture of the {}",
    "a close view of a {}",
    "a bright picture of a {}",
    "a dark photo of the {}",
    "a good photo of a {}",
    "a clean picture of the {}",
    "there is a {}",
    "this is the {}",
    "a {} by itself",
)
STYLE_TEMPLATES = (
    "a picture in the style of {}",
    "a painting in the style of {}",
    "a drawing in the style of {}",
    "a scene in the style of {}",
    "a thing drawn as {}",
    "a photo that looks like {}",
    "something in {} style",
    "a bright picture in the style of {}",
    "a dark picture in the style of {}",
)
PLACES = (
    "on the beach", "in the snow", "on the grass", "in a forest", "in the city", "on a wooden table", "under water",
    "on a street", "in a garden", "on top of a mountain", "in front of a house", "in the desert", "on a carpet",
    "in the rain", "at night", "by the sea", "in the sky", "on a road", "in a field of flowers", "on the moon",
)  # fmt: skip
COMPANY = (
    "next to a tree", "beside a dog", "with a cat", "and a red ball", "behind a chair", "on a boat", "near a car",
    "under an umbrella", "with a bird", "and a green bottle", "in front of a wall", "beside a cup",
)  # fmt: skip


def read_templates(file: Path) -> tuple[str, ...]:
    """Templates, one a line; empty lines are left out.

    Raises:
        UserError: the file cannot be read, is empty, or a line has not exactly one `{}`.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"templates {file}: cannot be read as text ({error})") from error
    templates = tuple(line for line in lines if line)
    if not templates:
        raise UserError(f"templates {file}: is empty; expected one template a line, like 'a photo of a {{}}'")
    for number, template in enumerate(lines, 1):
        if template and template.count("{}") != 1:
            raise UserError(f"templates {file}:{number}: {template!r}: expected {{}} once, where the subject stands")
    return templates


def templates_of(kind: Kind, file: Path | None = None) -> tuple[str, ...]:
    """The templates of a kind, or those of `file`."""
    if file is not None:
        return read_templates(file)
    return SUBJECT_TEMPLATES if kind == "subject" else STYLE_TEMPLATES


def composed(prompt: str, rng: np.random.Generator) -> str:
    """The prompt with a place, company or both added: "… next to a tree on the beach"."""
    pieces = [str(rng.choice(PLACES))] if rng.random() < 0.7 else []
    if not pieces or rng.random() < 0.4:
        pieces.insert(0, str(rng.choice(COMPANY)))
    return " ".join([prompt, *pieces])


def fill(template: str, thing: str, size_words: str = "") -> str:
    """The template with the thing in it, its size said before: "a very small dog" for "a {}"."""
    return template.replace("{}", f"{size_words}{thing}")


def draw_template(templates: Sequence[str], rng: np.random.Generator) -> str:
    """One of the templates."""
    return templates[int(rng.integers(len(templates)))]
