"""Another view of a reference: mirrored, turned, in another perspective, before another background.

Training would otherwise learn to copy the reference's pose and surroundings (Subject-Diffusion, arXiv 2307.11410, code:
background replaced, flip 0.5, rotation 10, perspective 0.5). Colours and alpha are warped as one, in one resampling;
where the cut-out then stands in its frame is `model/reference.py`'s matter.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from data_pipeline.errors import UserError
from data_pipeline.toybox.backgrounds import BACKGROUNDS, paint_background
from train.data.shard_scenes import reduced_picture
from train.settings import ReferenceSettings

# Draws a background, (h, w, 3) uint8; None: there is none to be had, the reference stays on mid-grey.
BackgroundSource = Callable[[np.random.Generator], np.ndarray | None]

DISTORTION = 0.5  # of the perspective: each corner moves inwards by up to half of it, as a share of the side
DETAIL = 2  # a cut-out more than this many times larger than its frame is averaged down first
TRIES = 8  # pictures of a folder, where one cannot be decoded
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
PAINTINGS = 48  # of one background


def augment(cutout: np.ndarray, settings: ReferenceSettings, size: int, rng: np.random.Generator) -> np.ndarray:
    """A cut-out as `settings` may turn it; always draws the same number of times from `rng`.

    Args:
        cutout: (h, w, 4) uint8 RGBA.
        size: side of the frame in which it will stand, pixels.
    Returns:
        (h', w', 4) uint8 RGBA.
    """
    flip, turn, bend = rng.random() < settings.flip, rng.uniform(-1, 1), rng.random() < settings.perspective
    corners = rng.random((4, 2)) * DISTORTION / 2
    degrees = turn * settings.rotation_degrees
    if not (flip or degrees or bend):
        return cutout
    view, large = cutout, max(cutout.shape[:2]) / (DETAIL * size)
    if large > 1:
        shape = (max(1, round(cutout.shape[1] / large)), max(1, round(cutout.shape[0] / large)))
        view = _plain(cv2.resize(_premultiplied(cutout), shape, interpolation=cv2.INTER_AREA))
    height, width = view.shape[:2]
    matrix = rotation(width, height, degrees) @ (perspective(width, height, corners) if bend else np.eye(3))
    if flip:
        matrix = matrix @ np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]])
    warped = warp(view, matrix)
    return warped if (warped[..., 3] > 127).any() else cutout  # a thread of a subject may vanish


def rotation(width: int, height: int, degrees: float) -> np.ndarray:
    """About the middle, counter-clockwise as one sees it: (3, 3), of points (x, y, 1) with pixel edges at integers."""
    affine = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1.0)
    return np.vstack([affine, [0, 0, 1]])


def perspective(width: int, height: int, inwards: np.ndarray) -> np.ndarray:
    """Each corner moved inwards, as torchvision's RandomPerspective does: (3, 3).

    Args:
        inwards: (4, 2) shares of width and height, of the corners top left, top right, bottom right, bottom left.
    """
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    towards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], np.float32)
    moved = corners + (towards * inwards * (width, height)).astype(np.float32)
    return cv2.getPerspectiveTransform(corners, moved)


def warp(cutout: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """RGBA under a transform of its plane, on a canvas that holds all of it."""
    height, width = cutout.shape[:2]
    corners = matrix @ np.array([[0, width, width, 0], [0, 0, height, height], [1, 1, 1, 1]], float)  # (3, 4)
    points = corners[:2] / corners[2]
    low, high = np.floor(points.min(axis=1) + 1e-6), np.ceil(points.max(axis=1) - 1e-6)
    whole = np.array([[1, 0, -low[0]], [0, 1, -low[1]], [0, 0, 1]]) @ matrix
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV puts pixel centres, not edges, at integers
    shape = (max(1, int(high[0] - low[0])), max(1, int(high[1] - low[1])))
    moved = cv2.warpPerspective(_premultiplied(cutout), np.linalg.inv(half) @ whole @ half, shape)
    return _plain(moved)


def _premultiplied(rgba: np.ndarray) -> np.ndarray:
    """float32 0..1 with colours times alpha, so that hidden colours do not bleed into the edge."""
    view: np.ndarray = rgba.astype(np.float32) / 255
    view[..., :3] *= view[..., 3:]
    return view


def _plain(view: np.ndarray) -> np.ndarray:
    colours = view[..., :3] / np.maximum(view[..., 3:], 1e-3)
    return (np.dstack([colours, view[..., 3]]).clip(0, 1) * 255).round().astype(np.uint8)


class FolderPictures:
    """Backgrounds from a folder of pictures, as published (BG-20k)."""

    def __init__(self, folder: Path, size: int) -> None:
        """
        Args:
            size: side of the squares handed out, pixels.
        Raises:
            UserError: the folder holds no pictures.
        """
        self.size = size
        root = folder.expanduser()
        self.files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.files:
            raise UserError(
                f"data.references.backgrounds={folder}: no pictures ({', '.join(SUFFIXES)}); give a folder that has "
                "some, or leave the key out"
            )

    def __call__(self, rng: np.random.Generator) -> np.ndarray | None:
        for index in rng.integers(len(self.files), size=TRIES):
            try:
                return reduced_picture(self.files[index].read_bytes(), self.size)
            except (UserError, OSError):
                continue
        return None


class PaintedBackgrounds:
    """The toybox's own backgrounds, for references that are cut out of its scenes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, rng: np.random.Generator) -> np.ndarray | None:
        name = str(rng.choice(list(BACKGROUNDS)))
        return paint_background(name, int(rng.integers(PAINTINGS)), self.size)
