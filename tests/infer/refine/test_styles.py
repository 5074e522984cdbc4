"""`kind: style` on the toybox: three methods learn the manner of some pictures, not a thing in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.toybox.styles import style_pictures
from infer.refine.base import open_base
from infer.refine.method import Concept
from infer.refine.methods import load_method
from infer.refine.prompts import STYLE_TEMPLATES, SUBJECT_TEMPLATES
from infer.refine.subject_images import SubjectPicture
from tests.infer.refine.tiny_base import losses_on_toybox

# Learning rate, and the share of the first loss that is left: one vector can say little of a manner.
METHODS = {"lasr": (1e-2, 0.97), "textual-inversion": (1.0, 0.995), "custom-diffusion": (1e-3, 0.97)}


@pytest.fixture(scope="module")
def style() -> Concept:
    pictures = style_pictures("duotone", 3, seed=0)
    opaque = [np.dstack([picture, np.full(picture.shape[:2], 255, np.uint8)]) for picture in pictures]
    shown = [SubjectPicture(Path(f"{index}.png"), rgba) for index, rgba in enumerate(opaque)]
    return Concept("z", "picture", "style", shown)


@pytest.mark.parametrize("method", METHODS)
def test_a_few_steps_lower_the_loss_of_a_style(method: str, style: Concept) -> None:
    known = load_method(method)
    torch.manual_seed(0)
    settings = known.settings()
    module = known.build(open_base("toybox", False, "cpu", STYLE_TEMPLATES), [style], settings)
    rate, left = METHODS[method]
    losses = losses_on_toybox(module, style, rate, 12, known.thing(style, settings))
    assert losses[-1] < left * losses[0], losses


def test_a_style_is_spoken_of_as_one() -> None:
    assert all("{}" in template for template in STYLE_TEMPLATES) and not set(STYLE_TEMPLATES) & set(SUBJECT_TEMPLATES)
    assert all(word not in template for template in STYLE_TEMPLATES for word in ("a {}", "the {}"))
