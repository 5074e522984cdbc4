"""Named backgrounds of the toybox, each a seeded painting that looks the same at any size.

Every painter takes a generator and a size in pixels and returns (size, size, 3) float32 RGB in 0..1. All random numbers
are drawn on grids of fixed shape, so that one seed gives one picture whatever the resolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

Generator = np.random.Generator
Painter = Callable[[Generator, int], np.ndarray]


@dataclass(frozen=True)
class Background:
    """A place and how a caption names it."""

    name: str
    phrases: tuple[str, ...]  # after a noun: "on the beach"
    alone: str  # without any subject: "an empty beach"
    paint: Painter


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return np.meshgrid(axis, axis)


def _noise(rng: Generator, size: int, cells: int, cells_y: int | None = None) -> np.ndarray:
    """Smooth noise in 0..1."""
    grid = rng.random((cells_y or cells, cells)).astype(np.float32)
    return cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC).clip(0, 1)


def _mix(
    first: np.ndarray | tuple[float, ...], second: np.ndarray | tuple[float, ...], share: np.ndarray
) -> np.ndarray:
    a, b = np.asarray(first, np.float32), np.asarray(second, np.float32)
    return a + (b - a) * share[..., None]


def _horizon(rng: Generator, size: int, above: np.ndarray, below: np.ndarray, line: float, rough: float) -> np.ndarray:
    x, y = _grid(size)
    edge = line + rough * (_noise(rng, size, 6)[0][None] - 0.5)
    return _mix(above, below, ((y - edge) * size).clip(0, 1))


def _sky(rng: Generator, size: int, top: tuple[float, ...], low: tuple[float, ...], clouds: float = 0.5) -> np.ndarray:
    _, y = _grid(size)
    sky = _mix(top, low, (y * 1.6).clip(0, 1))
    return _mix(sky, (1.0, 1.0, 1.0), ((_noise(rng, size, 5, 8) - 0.6) * 3).clip(0, 1) * clouds)


def _beach(rng: Generator, size: int) -> np.ndarray:
    x, y = _grid(size)
    sea = _mix((0.1, 0.55, 0.8), (0.25, 0.75, 0.85), ((y - 0.3) * 4).clip(0, 1))
    picture = _horizon(rng, size, _sky(rng, size, (0.45, 0.75, 1.0), (0.8, 0.93, 1.0)), sea, 0.32, 0.0)
    sand = _mix((0.96, 0.87, 0.64), (0.88, 0.76, 0.52), _noise(rng, size, 12) * 0.7)
    return _horizon(rng, size, picture, sand, 0.56, 0.1)


def _snow(rng: Generator, size: int) -> np.ndarray:
    ground = _mix((0.97, 0.98, 1.0), (0.8, 0.87, 0.96), _noise(rng, size, 4, 8) * 0.8)
    picture = _horizon(rng, size, _sky(rng, size, (0.62, 0.72, 0.84), (0.85, 0.9, 0.95), 0.2), ground, 0.45, 0.25)
    return _dots(rng, picture, 40, 0.008, (1.0, 1.0, 1.0))


def _forest(rng: Generator, size: int) -> np.ndarray:
    x, y = _grid(size)
    picture = _mix((0.2, 0.42, 0.24), (0.08, 0.24, 0.14), _noise(rng, size, 7) * 0.8)
    for _ in range(8):
        centre, width = rng.uniform(0, 1), rng.uniform(0.03, 0.07)
        picture = _mix(picture, (0.3, 0.19, 0.1), ((width / 2 - np.abs(x - centre)) * size).clip(0, 1) * (y < 0.85))
    return _horizon(rng, size, picture, _mix((0.2, 0.3, 0.1), (0.3, 0.24, 0.1), _noise(rng, size, 9)), 0.8, 0.12)


def _night(rng: Generator, size: int) -> np.ndarray:
    _, y = _grid(size)
    picture = _mix((0.02, 0.03, 0.12), (0.1, 0.1, 0.32), y)
    picture = _mix(picture, (0.3, 0.15, 0.45), _noise(rng, size, 3) * 0.35)
    return _dots(rng, picture, 60, 0.01, (1.0, 1.0, 0.85))


def _kitchen(rng: Generator, size: int) -> np.ndarray:
    x, y = _grid(size)
    tile = rng.choice([5, 6, 7])
    dark = (np.floor(x * tile) + np.floor(y * tile)) % 2
    hue = ((0.55, 0.78, 0.82), (0.6, 0.8, 0.66), (0.9, 0.7, 0.62))[int(rng.integers(3))]
    picture = _mix((0.95, 0.95, 0.92), hue, dark)
    joint = np.minimum(np.abs((x * tile) % 1 - 0.5), 1) > 0.47
    return _mix(picture, (0.75, 0.75, 0.75), (joint | (np.abs((y * tile) % 1 - 0.5) > 0.47)).astype(np.float32))


def _wood(rng: Generator, size: int) -> np.ndarray:
    x, y = _grid(size)
    planks, offset = 5, rng.random(5)
    row = np.minimum((y * planks).astype(int), planks - 1)
    shade = offset[row].astype(np.float32) * 0.6 + _noise(rng, size, 3, 40) * 0.4
    picture = _mix((0.72, 0.48, 0.27), (0.5, 0.3, 0.15), shade)
    return _mix(picture, (0.25, 0.14, 0.07), ((y * planks) % 1 < 0.06).astype(np.float32))


def _brick(rng: Generator, size: int) -> np.ndarray:
    x, y = _grid(size)
    rows = 9
    row = np.floor(y * rows)
    shifted = x * 5 + (row % 2) * 0.5
    shade = rng.random((rows, 7))[row.astype(int).clip(0, rows - 1), np.floor(shifted).astype(int).clip(0, 6)]
    picture = _mix((0.75, 0.3, 0.22), (0.52, 0.2, 0.16), shade.astype(np.float32))
    return _mix(picture, (0.82, 0.78, 0.72), ((shifted % 1 < 0.08) | ((y * rows) % 1 < 0.16)).astype(np.float32))


def _lawn(rng: Generator, size: int) -> np.ndarray:
    picture = _mix((0.45, 0.75, 0.25), (0.25, 0.55, 0.15), _noise(rng, size, 24) * 0.6 + _noise(rng, size, 4) * 0.4)
    flowers = ((1.0, 0.95, 0.3), (1.0, 1.0, 1.0), (1.0, 0.6, 0.8))[int(rng.integers(3))]
    return _dots(rng, picture, 18, 0.014, flowers)


def _desert(rng: Generator, size: int) -> np.ndarray:
    near = _mix((0.93, 0.6, 0.28), (0.8, 0.45, 0.2), _noise(rng, size, 3, 12))
    picture = _horizon(
        rng, size, _sky(rng, size, (0.98, 0.8, 0.5), (1.0, 0.92, 0.72), 0.0), near * 0.85 + 0.12, 0.42, 0.3
    )
    return _horizon(rng, size, picture, near, 0.62, 0.35)


def _lake(rng: Generator, size: int) -> np.ndarray:
    water = _mix((0.15, 0.4, 0.6), (0.35, 0.62, 0.78), (_noise(rng, size, 3, 22) * 1.2 - 0.1).clip(0, 1))
    far = np.full((size, size, 3), (0.3, 0.5, 0.38), np.float32)
    hills = _horizon(rng, size, _sky(rng, size, (0.6, 0.8, 0.95), (0.9, 0.95, 1.0)), far, 0.3, 0.3)
    return _horizon(rng, size, hills, water, 0.42, 0.0)


def _city(rng: Generator, size: int) -> np.ndarray:
    x, y = _grid(size)
    picture = _mix((0.25, 0.2, 0.45), (0.95, 0.55, 0.5), y)
    for left in np.linspace(0, 0.92, 7):
        top, width = rng.uniform(0.25, 0.65), rng.uniform(0.11, 0.17)
        wall = (x >= left) & (x < left + width) & (y > top)
        picture = np.where(wall[..., None], np.array((0.12, 0.11, 0.22), np.float32), picture)
        lit = wall & ((x * 24) % 1 > 0.55) & ((y * 20) % 1 > 0.55) & (_noise(rng, size, 9) > 0.4)
        picture = np.where(lit[..., None], np.array((1.0, 0.85, 0.4), np.float32), picture)
    return picture


def _carpet(rng: Generator, size: int) -> np.ndarray:
    x, y = _grid(size)
    turn = np.abs(x - 0.5) + np.abs(y - 0.5)
    first = ((0.6, 0.12, 0.2), (0.15, 0.2, 0.5), (0.4, 0.15, 0.45))[int(rng.integers(3))]
    picture = _mix(first, (0.9, 0.75, 0.45), ((turn * 7) % 1 > 0.6).astype(np.float32))
    return picture * (0.9 + 0.2 * _noise(rng, size, 32))[..., None]


def _library(rng: Generator, size: int) -> np.ndarray:
    x, y = _grid(size)
    shelf = np.minimum((y * 4).astype(int), 3)
    book = np.minimum((x * 16).astype(int), 15)
    hsv = np.stack([rng.integers(0, 180, (4, 16)), rng.integers(60, 180, (4, 16)), rng.integers(80, 200, (4, 16))], -1)
    colours = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB).astype(np.float32) / 255
    picture = colours[shelf, book]
    short = ((y * 4) % 1) < rng.uniform(0.1, 0.35, (4, 16)).astype(np.float32)[shelf, book]
    picture = np.where(short[..., None], np.array((0.18, 0.1, 0.06), np.float32), picture)
    return np.where((((y * 4) % 1) > 0.9)[..., None], np.array((0.45, 0.28, 0.15), np.float32), picture)


def _autumn(rng: Generator, size: int) -> np.ndarray:
    picture = _mix((0.5, 0.3, 0.12), (0.35, 0.2, 0.1), _noise(rng, size, 10))
    for colour in ((0.9, 0.45, 0.1), (0.85, 0.2, 0.1), (0.95, 0.75, 0.2)):
        picture = _dots(rng, picture, 34, 0.03, colour)
    return picture


def _storm(rng: Generator, size: int) -> np.ndarray:
    x, y = _grid(size)
    picture = _mix((0.22, 0.25, 0.3), (0.45, 0.48, 0.52), _noise(rng, size, 4, 6))
    lanes, rows = 12, 3
    across = x * lanes + y * 4  # slanted lanes, each with strokes of its own
    lane = across.astype(int)
    along = y * rows + rng.random(lanes + 4).astype(np.float32)[lane]
    reach = rng.uniform(0.5, 0.9, (rows + 1, lanes + 4)).astype(np.float32)[along.astype(int), lane]
    aside = np.abs(across % 1 - 0.5) / lanes  # from the middle of the lane, as a share of the picture
    rain = ((0.005 - aside) * size + 0.5).clip(0, 1) * (along % 1 < reach)
    return _mix(picture, (0.7, 0.78, 0.88), rain * np.float32(0.7))


def _sunset(rng: Generator, size: int) -> np.ndarray:
    x, y = _grid(size)
    picture = _mix((0.45, 0.2, 0.5), (1.0, 0.55, 0.2), (y * 1.5).clip(0, 1))
    centre = rng.uniform(0.25, 0.75)
    sun = ((0.16 - np.hypot(x - centre, y - 0.55)) * size).clip(0, 1)
    picture = _mix(picture, (1.0, 0.9, 0.45), sun)
    return _horizon(rng, size, picture, _mix((0.3, 0.12, 0.3), (0.75, 0.35, 0.3), _noise(rng, size, 3, 16)), 0.66, 0.0)


def _underwater(rng: Generator, size: int) -> np.ndarray:
    _, y = _grid(size)
    picture = _mix((0.1, 0.6, 0.75), (0.02, 0.2, 0.42), y)
    picture = _mix(picture, (0.6, 0.95, 1.0), ((_noise(rng, size, 6, 2) - 0.6) * 2).clip(0, 1) * (1 - y))
    return _dots(rng, picture, 16, 0.02, (0.75, 0.95, 1.0))


def _street(rng: Generator, size: int) -> np.ndarray:
    x, y = _grid(size)
    picture = _mix((0.36, 0.37, 0.4), (0.28, 0.29, 0.31), _noise(rng, size, 30))
    stripes = (np.abs(y - 0.52) < 0.03) & ((x * 4 + rng.random()) % 1 < 0.55)
    picture = _mix(picture, (0.95, 0.9, 0.6), stripes.astype(np.float32))
    return _mix(picture, (0.72, 0.7, 0.66), ((y < 0.16) | (y > 0.88)).astype(np.float32))


def _studio(rng: Generator, size: int) -> np.ndarray:
    x, y = _grid(size)
    hsv = np.array([[[rng.integers(0, 180), 60, 235]]], np.uint8)
    colour = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32) / 255
    return _mix(tuple(colour), tuple(colour * 0.72), (np.hypot(x - 0.5, y - 0.4) * 1.3).clip(0, 1))


def _dots(rng: Generator, picture: np.ndarray, count: int, radius: float, colour: tuple[float, ...]) -> np.ndarray:
    """Soft discs at random places; radius as a share of the picture."""
    size = picture.shape[0]
    out = np.ascontiguousarray(picture, np.float32)
    for x, y, share in rng.random((count, 3)):
        reach = max(radius * (0.6 + 0.8 * share) * size, 0.45)
        point = (int(x * size * 16), int(y * size * 16))
        cv2.circle(out, point, int(reach * 16), colour, -1, cv2.LINE_AA, shift=4)
    return out


BACKGROUNDS: dict[str, Background] = {
    b.name: b
    for b in (
        Background("beach", ("on the beach", "at the seaside"), "an empty beach", _beach),
        Background("snow", ("in the snow",), "a snowy field", _snow),
        Background("forest", ("in the forest", "among the trees"), "a dark forest", _forest),
        Background("night", ("under the night sky", "at night"), "the night sky", _night),
        Background("kitchen", ("on kitchen tiles",), "kitchen tiles", _kitchen),
        Background("wood", ("on a wooden floor",), "a wooden floor", _wood),
        Background("brick", ("in front of a brick wall",), "a brick wall", _brick),
        Background("lawn", ("on the lawn", "in the grass"), "a lawn with flowers", _lawn),
        Background("desert", ("in the desert",), "an empty desert", _desert),
        Background("lake", ("by the lake",), "a quiet lake", _lake),
        Background("city", ("in the city at dusk",), "a city at dusk", _city),
        Background("carpet", ("on a carpet",), "a patterned carpet", _carpet),
        Background("library", ("in the library", "in front of bookshelves"), "a library", _library),
        Background("autumn", ("on autumn leaves",), "autumn leaves", _autumn),
        Background("storm", ("in the rain",), "a rain storm", _storm),
        Background("sunset", ("at sunset",), "a sunset", _sunset),
        Background("underwater", ("under water",), "the deep sea", _underwater),
        Background("street", ("on the street",), "an empty street", _street),
        Background("studio", ("on a plain backdrop",), "a plain backdrop", _studio),
    )
}


def paint_background(name: str, seed: int, size: int) -> np.ndarray:
    """(size, size, 3) uint8 picture of a named background."""
    picture = BACKGROUNDS[name].paint(np.random.default_rng((seed, 31)), size)
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)
