"""Toybox styles: pure filters that look alike at every size, each unlike the others and the scene it was."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest

from data_pipeline.toybox.styles import DARK, INK, LEVELS, LIGHT, PAPER, STYLES, style_pictures
from data_pipeline.toybox.world import ToyboxWorld


def scene(size: int = 64) -> np.ndarray:
    return ToyboxWorld(seed=1, size=size, min_subjects=1).scene(0).image


@pytest.mark.parametrize("name", STYLES)
def test_a_style_is_a_pure_function_of_a_picture(name: str) -> None:
    shown = scene()
    before = shown.copy()
    made = STYLES[name](shown)
    assert made.shape == shown.shape and made.dtype == np.uint8
    assert np.array_equal(shown, before) and np.array_equal(made, STYLES[name](shown))
    assert STYLES[name](shown[:40]).shape == (40, 64, 3)


def test_styles_are_unlike_each_other_and_the_scene() -> None:
    pictures = [scene(), *(style(scene()) for style in STYLES.values())]
    for one, other in itertools.combinations(pictures, 2):
        assert np.abs(one.astype(float) - other).mean() > 10


def test_a_style_keeps_to_its_colours() -> None:
    between = {"ink": (PAPER, INK), "hatched": (PAPER, INK), "duotone": (DARK, LIGHT)}
    for name, ends in between.items():
        first, last = (np.array(end, float) for end in ends)
        made = STYLES[name](scene()).reshape(-1, 3) - first
        share = made @ (last - first) / ((last - first) ** 2).sum()
        assert np.abs(made - share[:, None] * (last - first)).max() <= 1, name
    assert len(np.unique(STYLES["posterised"](scene()))) <= LEVELS


def test_an_outline_is_drawn_where_colours_meet_and_a_hatch_where_it_is_dark() -> None:
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, 32:] = 255
    drawn = STYLES["ink"](halves)
    assert np.array_equal(drawn[30, 31], INK) and np.array_equal(drawn[30, 5], PAPER)
    lines = STYLES["hatched"](halves)
    assert np.array_equal(lines[:, 40], np.tile(PAPER, (64, 1))) and (lines[:, 5] == INK).any()


@pytest.mark.parametrize("name", ["ink", "posterised", "watercolour", "duotone"])
def test_a_style_looks_alike_at_twice_the_size(name: str) -> None:
    small = STYLES[name](scene()).astype(float)
    large = cv2.resize(STYLES[name](scene(128)), (64, 64), interpolation=cv2.INTER_AREA).astype(float)
    others = [STYLES[other](scene()).astype(float) for other in STYLES if other != name]
    assert np.abs(large - small).mean() < min(np.abs(large - other).mean() for other in others)


def test_pictures_of_a_style_show_a_scene_each() -> None:
    made = style_pictures("duotone", 3, seed=4, size=32)
    assert [picture.shape for picture in made] == [(32, 32, 3)] * 3
    assert all(not np.array_equal(one, other) for one, other in itertools.combinations(made, 2))
    assert np.array_equal(made[2], style_pictures("duotone", 3, seed=4, size=32)[2])
