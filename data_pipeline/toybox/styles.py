"""Toybox styles: filters over rendered scenes, the manners that `refine --kind style` learns and is measured by.

A style is a pure function of a picture, (H, W, 3) uint8 -> the same; what a scene shows and where stays as it was.
`style_pictures` draws what a person would give: some pictures in one style, each of another scene.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import cv2
import numpy as np

from data_pipeline.toybox.world import ToyboxWorld

Picture = np.ndarray  # (H, W, 3) uint8
PAPER, INK = (250, 246, 235), (32, 30, 48)
DARK, LIGHT = (38, 20, 92), (255, 190, 80)  # of duotone
LEVELS = 4  # of a posterised channel
HATCHES = ((0.75, 1), (0.5, -1), (0.25, 0))  # darker than so much -> lines that rise, that fall, that lie


def ink(picture: Picture) -> Picture:
    """Dark outlines on paper, nothing inside."""
    smooth = cv2.GaussianBlur(picture, (0, 0), max(_unit(picture) * 0.6, 0.4)).astype(np.float32)
    across, down = (cv2.Sobel(smooth, cv2.CV_32F, *way, ksize=3) for way in ((1, 0), (0, 1)))
    strength = np.hypot(across, down).max(axis=2) / 255  # (H, W)
    return _blended(PAPER, INK, np.clip((strength - 0.25) * 2, 0, 1))


def posterised(picture: Picture) -> Picture:
    """Flat areas of few, strong colours."""
    flat = cv2.medianBlur(picture, 2 * round(_unit(picture)) + 1).astype(np.float32)
    grey = flat.mean(axis=2, keepdims=True)
    strong: np.ndarray = np.clip(grey + 1.6 * (flat - grey), 0, 255)
    return (np.round(strong / 255 * (LEVELS - 1)) * (255 / (LEVELS - 1))).astype(np.uint8)


def hatched(picture: Picture) -> Picture:
    """Shades as crossing lines of ink."""
    light = _light(picture)
    rows, columns = np.indices(light.shape)
    pitch = max(2, round(4 * _unit(picture)))
    lines = np.zeros(light.shape, bool)
    for limit, slope in HATCHES:
        phase = rows if slope == 0 else columns + slope * rows
        lines |= (light < limit) & (phase % pitch < pitch / 3)
    return _blended(PAPER, INK, lines.astype(np.float32))


def watercolour(picture: Picture) -> Picture:
    """Pale washes that run into one another, on grained paper."""
    unit = _unit(picture)
    smooth = cv2.bilateralFilter(picture, 0, 60, 2.5 * unit)
    wash = cv2.GaussianBlur(smooth, (0, 0), unit).astype(np.float32)
    pale = 255 - (255 - wash) * 0.7
    grain = np.random.default_rng(0).normal(0, 9, picture.shape[:2]).astype(np.float32)  # the same sheet always
    return np.clip(pale + grain[..., None], 0, 255).astype(np.uint8)


def duotone(picture: Picture) -> Picture:
    """Two inks: dark violet to orange."""
    return _blended(DARK, LIGHT, np.clip(1.3 * (_light(picture) - 0.5) + 0.5, 0, 1))


STYLES: MappingProxyType[str, Callable[[Picture], Picture]] = MappingProxyType(
    {"ink": ink, "posterised": posterised, "hatched": hatched, "watercolour": watercolour, "duotone": duotone}
)


def style_pictures(name: str, count: int, seed: int, size: int = 64) -> list[Picture]:
    """Scenes of training subjects in one style.

    Args:
        name: one of `STYLES`.
        seed: of the scenes; their things differ from picture to picture.
        size: pixels, of each side.
    """
    style = STYLES[name]
    world = ToyboxWorld(seed=seed, size=size, split="train", min_subjects=1)
    return [style(world.scene(index).image) for index in range(count)]


def _unit(picture: Picture) -> float:
    """Pixels that are 1/64 of the picture: filters look alike at every size."""
    return min(picture.shape[:2]) / 64


def _light(picture: Picture) -> np.ndarray:
    """(H, W) float32, 0..1."""
    return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255


def _blended(start: tuple[int, ...], end: tuple[int, ...], share: np.ndarray) -> Picture:
    """Colours between two, by a share (H, W)."""
    first, last = np.array(start, np.float32), np.array(end, np.float32)
    return np.round(first + share[..., None] * (last - first)).astype(np.uint8)
