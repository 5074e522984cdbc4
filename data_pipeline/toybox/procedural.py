"""Procedural subjects and part-recoloured ones: 800-odd emoji are too few to learn "any subject" from.

A random silhouette is filled with a palette in a pattern and shaded like a soft 3D toy, so that it sits beside the
emoji; `recolour` shifts the hue of one colour cluster of a cut-out, which makes another subject with the same noun.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from data_pipeline.toybox.archive import CUTOUT_SIZE, ToyboxSubject

Generator = np.random.Generator
_SIZE = 3 * CUTOUT_SIZE // 2  # drawn larger, then averaged


def _polar(radius: np.ndarray, angle: np.ndarray, stretch: float = 1.0) -> np.ndarray:
    """Outline from radii in 0..1 -> integer points of a polygon."""
    x, y = radius * np.cos(angle) * stretch, radius * np.sin(angle) / stretch
    scale = 0.46 * _SIZE / max(np.abs(x).max(), np.abs(y).max())
    return np.stack([x * scale + _SIZE / 2, y * scale + _SIZE / 2], axis=1).round().astype(np.int32)


def _fill(points: np.ndarray) -> np.ndarray:
    mask = np.zeros((_SIZE, _SIZE), np.uint8)
    cv2.fillPoly(mask, [points], 255, lineType=cv2.LINE_AA)
    return mask


_ANGLES = np.linspace(0, 2 * np.pi, 120, endpoint=False)


def _blob(rng: Generator) -> np.ndarray:
    radius = 1.0 + sum(rng.uniform(0, 0.35) / k * np.cos(k * _ANGLES + rng.uniform(0, 2 * np.pi)) for k in range(2, 6))
    return _fill(_polar(np.asarray(radius), _ANGLES, rng.uniform(0.8, 1.25)))


def _star(rng: Generator) -> np.ndarray:
    points, depth = int(rng.integers(3, 10)), rng.uniform(0.15, 0.5)
    sharp = rng.random() < 0.5
    wave = np.abs(((_ANGLES * points / np.pi) % 2) - 1) if sharp else 0.5 + 0.5 * np.cos(points * _ANGLES)
    return _fill(_polar(1 - depth * wave, _ANGLES + rng.uniform(0, np.pi)))


def _polygon(rng: Generator) -> np.ndarray:
    count = int(rng.integers(3, 9))
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.uniform(0, np.pi)
    points = _polar(rng.uniform(0.8, 1.0, count), angle, rng.uniform(0.75, 1.3))
    return cv2.GaussianBlur(_fill(points), (0, 0), rng.uniform(1, 8)) // 128 * 255


def _vase(rng: Generator) -> np.ndarray:
    knots = rng.uniform(0.15, 0.5, 6)
    height = np.linspace(0, 1, 40)
    half = np.interp(height, np.linspace(0, 1, 6), knots)
    half = cv2.GaussianBlur(half.astype(np.float32)[None], (9, 1), 2)[0]
    x = np.concatenate([0.5 + half * 0.85, (0.5 - half * 0.85)[::-1]])
    y = np.concatenate([0.05 + 0.9 * height, (0.05 + 0.9 * height)[::-1]])
    return _fill((np.stack([x, y], axis=1) * _SIZE).round().astype(np.int32))


def _creature(rng: Generator) -> np.ndarray:
    mask = np.zeros((_SIZE, _SIZE), np.uint8)

    def oval(x: float, y: float, a: float, b: float, turn: float = 0) -> None:
        centre, axes = (int(x * _SIZE), int(y * _SIZE)), (int(a * _SIZE), int(b * _SIZE))
        cv2.ellipse(mask, centre, axes, turn, 0, 360, 255, -1, cv2.LINE_AA)

    wide, head = rng.uniform(0.2, 0.3), rng.uniform(0.15, 0.24)
    oval(0.5, 0.62, wide, rng.uniform(0.2, 0.28))
    oval(0.5, 0.33, head, head)
    spread, long = rng.uniform(0.6, 1.1), rng.uniform(0.07, 0.17)
    for side in (-1, 1):
        oval(0.5 + side * head * spread, 0.33 - head, rng.uniform(0.05, 0.08), long, side * rng.uniform(0, 40))
        oval(0.5 + side * wide * 0.6, 0.87, 0.08, 0.07)
        oval(0.5 + side * (wide + 0.04), 0.58, 0.06, 0.13, side * rng.uniform(-50, 50))
    return mask


def _composite(rng: Generator) -> np.ndarray:
    mask = np.zeros((_SIZE, _SIZE), np.uint8)
    for _ in range(int(rng.integers(2, 5))):
        x, y = rng.integers(int(0.2 * _SIZE), int(0.6 * _SIZE), 2)
        w, h = rng.integers(int(0.14 * _SIZE), int(0.36 * _SIZE), 2)
        if rng.random() < 0.6:
            cv2.rectangle(mask, (int(x), int(y)), (int(x + w), int(y + h)), 255, -1)
        else:
            cv2.circle(mask, (int(x + w // 2), int(y + h // 2)), int(w // 2 + _SIZE // 32), 255, -1, cv2.LINE_AA)
    cv2.rectangle(mask, (int(0.42 * _SIZE), int(0.2 * _SIZE)), (int(0.56 * _SIZE), int(0.8 * _SIZE)), 255, -1)
    return mask


_SILHOUETTES: dict[str, Callable[[Generator], np.ndarray]] = {
    "blob": _blob, "star": _star, "gem": _polygon, "vase": _vase, "creature": _creature, "gadget": _composite,
}  # fmt: skip


def _palette(rng: Generator, count: int) -> np.ndarray:
    """(count, 3) RGB in 0..1: one hue family with a contrasting accent."""
    hue = rng.uniform(0, 180)
    hues = (hue + rng.choice([0, 12, -15, 60, 90, 120], count)) % 180
    hsv = np.stack([hues, rng.uniform(60, 240, count), rng.uniform(90, 250, count)], axis=1)
    hsv[rng.random(count) < 0.15, 1] = 10  # now and then white, grey or black
    return cv2.cvtColor(hsv.astype(np.uint8)[None], cv2.COLOR_HSV2RGB)[0].astype(np.float32) / 255


_GRID = np.mgrid[0:_SIZE, 0:_SIZE] / _SIZE  # (2, size, size): y and x in 0..1


def _fraction(values: np.ndarray) -> np.ndarray:
    """`values % 1`, a good deal faster."""
    return values - np.floor(values)


def _pattern(rng: Generator) -> np.ndarray:
    """(size, size) integer map: which colour of the palette stands where."""
    y, x = _GRID
    turn = rng.uniform(0, np.pi)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    period = rng.uniform(0.12, 0.4)
    kind = rng.integers(0, 6)
    if kind == 0:
        return (_fraction(u / period) > rng.uniform(0.3, 0.7)).astype(int)
    if kind == 1:
        cell = np.hypot(_fraction(u / period) - 0.5, _fraction(v / period) - 0.5)
        return (cell < rng.uniform(0.22, 0.4)).astype(int)
    if kind == 2:
        return ((np.floor(u / period) + np.floor(v / period)) % 2).astype(int)
    if kind == 3:
        return (u > np.median(u) + rng.uniform(-0.15, 0.15)).astype(int) + (v > np.median(v) + 0.15)
    if kind == 4:
        rings = np.hypot(x - rng.uniform(0.35, 0.65), y - rng.uniform(0.35, 0.65))
        return (_fraction(rings / period) > 0.5).astype(int)
    patches = cv2.resize(rng.random((5, 5)).astype(np.float32), (_SIZE, _SIZE), interpolation=cv2.INTER_CUBIC)
    return (patches > 0.5).astype(int) + (patches > 0.8)


def _shaded(colour: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Soft light from the upper left, from a dome over the silhouette."""
    dome = np.sqrt(cv2.distanceTransform((mask > 127).astype(np.uint8), cv2.DIST_L2, 5))
    dome = cv2.GaussianBlur(dome, (0, 0), 4)
    light = (
        0.85
        - 0.35 * cv2.Sobel(dome, cv2.CV_32F, 1, 0, ksize=3) / 4
        - 0.35 * cv2.Sobel(dome, cv2.CV_32F, 0, 1, ksize=3) / 4
    )
    light = light.clip(-0.4, 1.6)[..., None] * -1 + 1.75
    return (colour * light.clip(0.45, 1.35)).clip(0, 1)


def procedural_subject(seed: int) -> tuple[ToyboxSubject, np.ndarray]:
    """A thing that exists nowhere else: the subject and its (128, 128, 4) RGBA uint8 cut-out, a function of `seed`."""
    rng = np.random.default_rng((seed, 7919))
    kind = str(rng.choice(list(_SILHOUETTES)))
    mask = _SILHOUETTES[kind](rng)
    colour = _palette(rng, 3)[_pattern(rng).clip(0, 2)]  # (size, size, 3)
    colour = colour * (1 + rng.uniform(-0.25, 0.25) * np.linspace(-1, 1, _SIZE)[:, None, None])
    colour = _shaded(colour.astype(np.float32), mask)
    if kind == "creature":
        for side in (-1, 1):
            centre = (int(_SIZE * (0.5 + side * 0.07)), int(_SIZE * 0.32))
            cv2.circle(colour, centre, _SIZE // 21, (1.0, 1.0, 1.0), -1, cv2.LINE_AA)
            cv2.circle(colour, centre, _SIZE // 42, (0.05, 0.05, 0.05), -1, cv2.LINE_AA)
    rgba = np.dstack([colour * 255, mask.astype(np.float32)])
    rgba = (
        cv2.resize(rgba, (CUTOUT_SIZE, CUTOUT_SIZE), interpolation=cv2.INTER_AREA).round().clip(0, 255).astype(np.uint8)
    )
    word = "animal" if kind == "creature" else "thing"
    subject = ToyboxSubject(f"procedural-{seed}", kind, kind, "Objects", word, f"procedural-{seed}", "train")
    return subject, rgba


def recolour(rgba: np.ndarray, seed: int) -> np.ndarray:
    """Another subject of the same noun: the hue of one colour cluster (the largest coloured one) is shifted.

    Args:
        rgba: (H, W, 4) uint8.
        seed: which shift, at least 30 degrees of hue.
    """
    rng = np.random.default_rng((seed, 104729))
    hsv = cv2.cvtColor(rgba[..., :3], cv2.COLOR_RGB2HSV)
    coloured = (rgba[..., 3] > 127) & (hsv[..., 1] > 40)
    out = rgba.copy()
    if not coloured.any():
        tint = np.array([rng.uniform(0.35, 1.0) for _ in range(3)])
        out[..., :3] = (rgba[..., :3] * tint).astype(np.uint8)
        return out
    counts = np.bincount(hsv[..., 0][coloured] // 15, minlength=12)
    distance = np.abs(hsv[..., 0].astype(int) - (int(counts.argmax()) * 15 + 7))
    cluster = np.minimum(distance, 180 - distance) < 16
    shifted = hsv.copy()
    shifted[..., 0] = np.where(cluster, (hsv[..., 0].astype(int) + int(rng.integers(25, 156))) % 180, hsv[..., 0])
    out[..., :3] = cv2.cvtColor(shifted, cv2.COLOR_HSV2RGB)
    return out
