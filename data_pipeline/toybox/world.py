"""The embedded small world: scene i of a seed is a picture with a caption, true boxes and masks, and references.

Everything is drawn on the fly and is a pure function of the constructor's arguments and the index. The references are
rendered separately from the target (other rotation, flip, light, background), so that copying pixels does not pay.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np

from data_pipeline.toybox.archive import SubjectArchive, ToyboxSubject
from data_pipeline.toybox.backgrounds import BACKGROUNDS, paint_background
from data_pipeline.toybox.captions import COLOUR_SHARE, GROUP_SHARE, Mention, colour_name, write_caption
from data_pipeline.toybox.procedural import procedural_subject, recolour

Generator = np.random.Generator
SUBJECT_SHARES = (0.08, 0.42, 0.28, 0.14, 0.08)  # of scenes with 0, 1, 2, 3, 4 subjects
MAX_SUBJECTS = 12
SIDES = ((0.36, 0.75), (0.3, 0.52), (0.26, 0.42), (0.24, 0.36))  # longer side of a subject, share of the picture
PROCEDURAL_SHARE = 0.4  # of training subjects are procedural or recoloured
PROCEDURAL_POOL = 20_000  # different procedural subjects of one seed
BACKGROUND_POOL = 48  # different paintings of one background
MIRROR_SHARE = 0.2  # of references that are mirrored against the target
BACKGROUND_SHARE = 0.5  # of references that stand on a background


@dataclass(frozen=True)
class ToyboxEntity:
    """A subject in a scene, and references of it."""

    subject: ToyboxSubject
    noun: str  # as it stands in the caption
    span: tuple[int, int]  # characters of the noun in the caption
    box_xyxy_px: tuple[float, float, float, float]
    mask: np.ndarray  # (H, W) bool, the visible part
    references: tuple[np.ndarray, ...]  # each (R, R, 4) uint8 RGBA
    reference_backgrounds: tuple[np.ndarray | None, ...]  # (R, R, 3) uint8, or None: on mid-grey


@dataclass(frozen=True)
class ToyboxScene:
    """A picture of the toybox with all that is true of it."""

    index: int
    image: np.ndarray  # (size, size, 3) uint8
    caption: str
    background: str
    entities: tuple[ToyboxEntity, ...]


@dataclass(frozen=True)
class Placement:
    """A cut-out to be drawn into a square, as shares of the picture."""

    cutout: np.ndarray  # (h, w, 4) uint8 RGBA
    centre: tuple[float, float]
    side: float  # longer side of the rotated subject


class ToyboxWorld:
    """Scenes of one split."""

    def __init__(
        self,
        split: str = "train",
        *,
        seed: int = 0,
        size: int = 64,
        reference_size: int = 64,
        min_subjects: int = 0,
        max_subjects: int = 4,
        references: tuple[int, int] = (1, 3),
        procedural_share: float | None = None,
        group_share: float = GROUP_SHARE,
        colour_share: float = COLOUR_SHARE,
        archive: SubjectArchive | None = None,
    ) -> None:
        """A world is a function of its arguments: equal arguments, equal scenes.

        Args:
            split: train, val or heldout: whose subjects are drawn.
            size: side of the scenes in pixels; `reference_size` that of the references.
            min_subjects: fewest in a scene, `max_subjects` the most (at most 12).
            references: fewest and most references of a subject.
            procedural_share: share of subjects that are procedural or recoloured; None: 0.4 in train, else 0.
            group_share: share of subjects that captions call by their group word.
            colour_share: share of captions that name a colour.
            archive: where the cut-outs come from, the packaged one by default.
        Raises:
            ValueError: an argument is out of its range.
        """
        self.archive = archive or SubjectArchive()
        self.subjects = self.archive.of_split(split)
        if not self.subjects:
            raise ValueError(f"split {split!r}: no subjects; expected train, val or heldout")
        if not 0 <= min_subjects <= max_subjects <= MAX_SUBJECTS:
            raise ValueError(
                f"min_subjects={min_subjects}, max_subjects={max_subjects}: "
                f"expected 0 <= min_subjects <= max_subjects <= {MAX_SUBJECTS}"
            )
        if not 1 <= references[0] <= references[1]:
            raise ValueError(f"references={references}: expected (fewest, most) with 1 <= fewest <= most")
        if procedural_share is None:
            procedural_share = PROCEDURAL_SHARE if split == "train" else 0.0
        given = {"procedural_share": procedural_share, "group_share": group_share, "colour_share": colour_share}
        for name, share in given.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share}: expected a share from 0 to 1")
        self.seed, self.size, self.reference_size = seed, size, reference_size
        self.references, self.procedural_share = references, procedural_share
        self.group_share, self.colour_share = group_share, colour_share
        counts = np.zeros(max_subjects + 1)
        counts[min_subjects:] = [*SUBJECT_SHARES, *[0.04] * (MAX_SUBJECTS - 4)][min_subjects : max_subjects + 1]
        self.shares = counts / counts.sum()

    def scene(self, index: int) -> ToyboxScene:
        """Scene `index` (any integer)."""
        rng = np.random.default_rng((self.seed, index % 2**62))
        count = int(rng.choice(len(self.shares), p=self.shares))
        subjects = [self._subject(rng) for _ in range(count)]
        background = str(rng.choice(list(BACKGROUNDS)))
        boxes = place(count, rng)
        # Half of the subjects are mirrored; their references follow, so that few are mirrored against the target.
        subjects = [(s, cv2.flip(cutout, 1) if rng.random() < 0.5 else cutout) for s, cutout in subjects]
        placements = [
            Placement(vary(cutout, rng, pixels=side * self.size, degrees=15, hue=6), centre, side)
            for (_, cutout), (centre, side) in zip(subjects, boxes, strict=True)
        ]
        image, masks = compose(placements, background, int(rng.integers(BACKGROUND_POOL)), self.size)
        visible = [i for i, mask in enumerate(masks) if mask.any()]
        truths = [box_of(masks[i]) for i in visible]
        mentions = [
            Mention(s.noun, s.group_word, colour_name(c), tuple(v / self.size for v in box))  # type: ignore[arg-type]
            for (s, c), box in zip((subjects[i] for i in visible), truths, strict=True)
        ]
        caption = write_caption(
            mentions, background, rng, group_share=self.group_share, colour_share=self.colour_share
        )  # fmt: skip
        entities = []
        for position, i in enumerate(visible):
            subject, cutout = subjects[i]
            views, behind = self._references(cutout, rng)
            entities.append(
                ToyboxEntity(
                    subject, caption.nouns[position], caption.spans[position], truths[position], masks[i], views, behind
                )
            )
        return ToyboxScene(index, image, caption.text, background, tuple(entities))

    def reference(self, cutout: np.ndarray, rng: Generator) -> np.ndarray:
        """One separately rendered view: (R, R, 4) uint8 RGBA, subject filling the frame."""
        size = self.reference_size
        view = vary(cutout, rng, pixels=size, degrees=25, hue=4, mirror=MIRROR_SHARE)
        canvas = np.zeros((size, size, 4), np.float32)
        _paste(canvas, view, (0.5, 0.5), 0.96)
        canvas[..., :3] /= np.maximum(canvas[..., 3:], 1e-3)
        return (canvas.clip(0, 1) * 255).round().astype(np.uint8)

    def _references(
        self, cutout: np.ndarray, rng: Generator
    ) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray | None, ...]]:
        views, behind = [], []
        for _ in range(int(rng.integers(self.references[0], self.references[1] + 1))):
            views.append(self.reference(cutout, rng))
            shown = rng.random() < BACKGROUND_SHARE
            name, number = str(rng.choice(list(BACKGROUNDS))), int(rng.integers(BACKGROUND_POOL))
            behind.append(_background(name, number, self.reference_size) if shown else None)
        return tuple(views), tuple(behind)

    def _subject(self, rng: Generator) -> tuple[ToyboxSubject, np.ndarray]:
        kind = rng.random()
        if kind < self.procedural_share * 0.6:
            return _procedural(self.seed * PROCEDURAL_POOL + int(rng.integers(PROCEDURAL_POOL)))
        subject = self.subjects[int(rng.integers(len(self.subjects)))]
        cutout = self.archive.cutout(subject.id)
        if kind < self.procedural_share:
            seed = int(rng.integers(2**31))
            # Another thing of the same noun: an equal id would claim that it is the same one.
            return replace(subject, id=f"{subject.id}-recoloured-{seed}"), recolour(cutout, seed)
        return subject, cutout


@lru_cache(maxsize=4000)
def _procedural(seed: int) -> tuple[ToyboxSubject, np.ndarray]:
    return procedural_subject(seed)


@lru_cache(maxsize=4000)
def _background(name: str, number: int, size: int) -> np.ndarray:
    return paint_background(name, number, size)


def place(count: int, rng: Generator) -> list[tuple[tuple[float, float], float]]:
    """Centres and sides of `count` subjects that hardly overlap, as shares of the picture."""
    low, high = SIDES[min(max(count, 1), len(SIDES)) - 1]
    for attempt in itertools.count():
        shrink = 0.97 ** (attempt // 8)  # crowded pictures: try again, ever smaller, until there is room
        found = []
        for _ in range(count):
            side = rng.uniform(low, high) * shrink
            x, y = rng.uniform(side * 0.48, 1 - side * 0.48, 2)
            found.append(((float(x), float(y)), float(side)))
        if all(_apart(a, b) for i, a in enumerate(found) for b in found[:i]):
            return found
    raise AssertionError("an endless loop ended")


def _apart(a: tuple[tuple[float, float], float], b: tuple[tuple[float, float], float]) -> bool:
    """Whether the squares overlap by at most an eighth of the smaller side in one direction."""
    gap = max(abs(a[0][0] - b[0][0]), abs(a[0][1] - b[0][1])) - (a[1] + b[1]) / 2
    return gap > -min(a[1], b[1]) / 8


def vary(
    cutout: np.ndarray, rng: Generator, *, pixels: float, degrees: float, hue: float, mirror: float = 0.0
) -> np.ndarray:
    """Another view of a cut-out: mirror image, rotation, light, slight tint; cropped to what is seen.

    Args:
        cutout: (h, h, 4) uint8 RGBA.
        pixels: side at which the view will be drawn; a much larger cut-out is averaged down first.
        degrees: largest rotation.
        hue: largest tint of a colour channel, per cent.
        mirror: share of views that are mirrored.
    Returns:
        (height, width, 4) float32 RGBA, premultiplied, 0..1.
    """
    flip, turn = rng.random() < mirror, rng.uniform(-degrees, degrees)
    light, contrast = rng.uniform(-0.08, 0.08), rng.uniform(0.88, 1.1)
    tint = 1 + rng.uniform(-hue, hue, 3).astype(np.float32) / 100
    view = _premultiplied(cutout)
    if view.shape[0] > 1.4 * pixels:
        side = max(8, math.ceil(1.2 * pixels))
        view = cv2.resize(view, (side, side), interpolation=cv2.INTER_AREA)
    if flip:
        view = cv2.flip(view, 1)
    # Contrast about mid-grey and light, on premultiplied colours; plane by plane, which is several times faster.
    *colours, alpha = (plane.astype(np.float32) / np.float32(255) for plane in cv2.split(view))  # (h, h) each
    lift = alpha * np.float32(0.5 - 0.5 * contrast + light)
    lit = [
        np.clip((plane * np.float32(contrast) + lift) * share, 0, alpha)
        for plane, share in zip(colours, tint, strict=True)
    ]
    view = cv2.merge([*lit, alpha])
    size = view.shape[0]
    diagonal = int(size * 1.42) + 2
    matrix = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), turn, 1.0)
    matrix[:, 2] += (diagonal - size) / 2
    turned = cv2.warpAffine(view, matrix, (diagonal, diagonal), flags=cv2.INTER_LINEAR)
    seen = turned[..., 3] > 0.3
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    return turned[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _paste(canvas: np.ndarray, view: np.ndarray, centre: tuple[float, float], side: float) -> np.ndarray:
    """Draw a premultiplied view into a premultiplied RGBA canvas; returns its alpha on the canvas, (H, W)."""
    size = canvas.shape[0]
    scale = side * size / max(view.shape[:2])
    width, height = max(1, round(view.shape[1] * scale)), max(1, round(view.shape[0] * scale))
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small = cv2.resize(view, (width, height), interpolation=method)
    np.clip(small, 0, 1, out=small)
    left, top = round(centre[0] * size - width / 2), round(centre[1] * size - height / 2)
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + width, size), min(top + height, size)
    part = small[y0 - top : y1 - top, x0 - left : x1 - left]
    region = canvas[y0:y1, x0:x1]
    region *= 1 - part[..., 3:]
    region += part
    alpha = np.zeros(canvas.shape[:2], np.float32)
    alpha[y0:y1, x0:x1] = part[..., 3]
    return alpha


def compose(
    placements: Sequence[Placement], background: str, number: int, size: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draw placements, later ones in front, on painting `number` of a background.

    Returns:
        (size, size, 3) uint8 and, for each placement, its visible part as (size, size) bool.
    """
    canvas = np.dstack(
        [_background(background, number, size).astype(np.float32) / 255, np.ones((size, size), np.float32)]
    )
    masks: list[np.ndarray] = []
    for placement in placements:
        _shadow(canvas, placement)
        view = (
            placement.cutout
            if placement.cutout.dtype == np.float32
            else _premultiplied(placement.cutout) / np.float32(255)
        )
        alpha = _paste(canvas, view, placement.centre, placement.side)
        masks = [mask & (alpha < 0.5) for mask in masks] + [alpha >= 0.5]
    return (canvas[..., :3].clip(0, 1) * 255).round().astype(np.uint8), masks


def _shadow(canvas: np.ndarray, placement: Placement) -> None:
    """A soft contact shadow under the subject."""
    size = canvas.shape[0]
    height = placement.cutout.shape[0] / max(placement.cutout.shape[:2]) * placement.side
    centre = (int(placement.centre[0] * size), int((placement.centre[1] + height * 0.47) * size))
    shade = np.zeros((size, size), np.float32)
    axes = (max(1, int(placement.side * size * 0.36)), max(1, int(placement.side * size * 0.08)))
    cv2.ellipse(shade, centre, axes, 0, 0, 360, 0.35, -1, cv2.LINE_AA)
    canvas[..., :3] *= 1 - cv2.GaussianBlur(shade, (0, 0), max(0.5, size * 0.012))[..., None]


def _premultiplied(rgba: np.ndarray) -> np.ndarray:
    """Colours times alpha, still uint8 (a tenth of the time that floats take)."""
    alpha = rgba[..., 3]
    return cv2.multiply(rgba, cv2.merge([alpha, alpha, alpha, np.full_like(alpha, 255)]), scale=1 / 255)


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Tight xyxy box of a mask, in pixels; the far edges are exclusive."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
