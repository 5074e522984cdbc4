"""What is asked for in the toybox, and what a right answer looks like.

A request names held-out subjects, a background and places; beside it stands a real render that answers it exactly. A
gallery holds another render of the subject (row 0), ten hard negatives (the same thing in other hues) and subjects of
other families, at most one of each. Everything is a function of the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.toybox.archive import SubjectArchive, ToyboxSubject
from data_pipeline.toybox.backgrounds import BACKGROUNDS, paint_background
from data_pipeline.toybox.captions import is_plural
from data_pipeline.toybox.world import BACKGROUND_POOL, Placement, ToyboxWorld, box_of, compose, place, vary
from infer.evaluate.judges import Judges
from infer.evaluate.scores import Box
from train.data.scenes import as_tensor

GALLERY = 50  # pictures
HARD_NEGATIVES = 10
PROMPTS = 4  # a subject
SIZE = 64  # pixels
PAINTINGS = 12  # of each background that a picture's background is compared with
COARSE = 16  # cells a side of that comparison


@dataclass(frozen=True)
class Request:
    """A picture that is asked for."""

    prompt: str
    subjects: tuple[ToyboxSubject, ...]
    words: tuple[str, ...]  # what the prompt calls them
    references: tuple[np.ndarray, ...]  # one a subject, (R, R, 4) uint8 RGBA
    boxes: tuple[Box, ...]  # xyxy as fractions
    background: str
    real: Tensor  # (3, SIZE, SIZE) 0..1, a render that answers the request
    seed: int


@dataclass(frozen=True)
class TuningScene:
    """A picture to tune a method with, and what its renderer knows of it."""

    picture: np.ndarray  # (SIZE, SIZE, 3) uint8
    mask: np.ndarray  # (SIZE, SIZE) uint8, 255 where the subject is
    caption: str  # names the subject by its noun


def held_out_subjects(archive: SubjectArchive, count: int) -> list[ToyboxSubject]:
    """The first held-out subjects in the archive's order, one a family."""
    seen: set[str] = set()
    chosen = []
    for subject in archive.of_split("heldout"):
        if subject.family not in seen:
            seen.add(subject.family)
            chosen.append(subject)
    return chosen[:count]


def single_requests(archive: SubjectArchive, subjects: Sequence[ToyboxSubject], seed: int = 0) -> list[Request]:
    """`PROMPTS` requests a subject: other backgrounds and places, the first half by noun, the others by group word."""
    return [
        request
        for number, subject in enumerate(subjects)
        for request in requests_of_subject(archive, subject, number, seed)
    ]


def requests_of_subject(
    archive: SubjectArchive, subject: ToyboxSubject, number: int, seed: int = 0
) -> tuple[Request, ...]:
    """The `PROMPTS` requests of subject `number` of a list."""
    rng = np.random.default_rng((seed, number))
    backgrounds = rng.permutation(list(BACKGROUNDS))[:PROMPTS]
    words = [subject.noun if i < PROMPTS // 2 else subject.group_word for i in range(PROMPTS)]
    return tuple(
        request_picture(archive, [subject], [word], rng, number * PROMPTS + i, background=str(background))
        for i, (word, background) in enumerate(zip(words, backgrounds, strict=True))
    )


def pair_requests(archive: SubjectArchive, subjects: Sequence[ToyboxSubject], seed: int = 1) -> list[Request]:
    """One request for every subject with its neighbour in the list, both by nouns."""
    requests: list[Request] = []
    for number, first in enumerate(subjects):
        second = next(s for s in [*subjects[number + 1 :], *subjects] if s.noun != first.noun)
        requests.append(request_of_pair(archive, first, second, number, seed))
    return requests


def request_of_pair(
    archive: SubjectArchive, first: ToyboxSubject, second: ToyboxSubject, number: int, seed: int = 1
) -> Request:
    """The request for subject `number` of a list with another one."""
    rng = np.random.default_rng((seed, number))
    background = str(rng.choice(list(BACKGROUNDS)))
    return request_picture(archive, [first, second], [first.noun, second.noun], rng, number, background=background)


def request_picture(
    archive: SubjectArchive,
    subjects: Sequence[ToyboxSubject],
    words: Sequence[str],
    rng: np.random.Generator,
    seed: int,
    *,
    background: str,
    shown: Sequence[np.ndarray] | None = None,
) -> Request:
    """Ask for subjects at random places on a background, and render the answer.

    Args:
        words: what the prompt calls the subjects.
        rng: decides places, the render and the references.
        seed: of the picture to be drawn.
        shown: cut-outs to render in place of the subjects' own, (128, 128, 4) uint8 RGBA each.
    """
    world = ToyboxWorld("heldout", archive=archive)
    places = place(len(subjects), rng)
    cutouts = [archive.cutout(subject.id) for subject in subjects]
    placements = [
        Placement(vary(cutout, rng, pixels=side * SIZE, degrees=15, hue=6), centre, side)
        for cutout, (centre, side) in zip(shown or cutouts, places, strict=True)
    ]
    picture, masks = compose(placements, background, int(rng.integers(BACKGROUND_POOL)), SIZE)
    named = " and ".join(_with_article(word) for word in words)
    return Request(
        prompt=f"{named} {BACKGROUNDS[background].phrases[0]}",
        subjects=tuple(subjects),
        words=tuple(words),
        references=tuple(world.reference(cutout, rng) for cutout in cutouts),
        boxes=tuple(_fractions(box_of(mask)) for mask in masks),
        background=background,
        real=as_tensor(picture),
        seed=seed,
    )


def tuning_scenes(
    archive: SubjectArchive, subject: ToyboxSubject, asked: Sequence[Request], count: int, number: int
) -> list[TuningScene]:
    """Pictures of a subject to tune a method with, on none of the backgrounds asked for.

    The first shows the very view that is given to those who see one picture, so that both can be caught copying it.

    Args:
        asked: the subject's requests.
        number: of the subject in its list.
    """
    rng = np.random.default_rng((3, number))
    used = {request.background for request in asked}
    backgrounds = rng.permutation([name for name in BACKGROUNDS if name not in used])
    pictures = []
    for i in range(count):
        ((centre, side),) = place(1, rng)
        view = vary(archive.cutout(subject.id), rng, pixels=side * SIZE, degrees=15, hue=6)
        placement = Placement(asked[0].references[0] if i == 0 else view, centre, side)
        background = str(backgrounds[i % len(backgrounds)])
        picture, (mask,) = compose([placement], background, int(rng.integers(BACKGROUND_POOL)), SIZE)
        caption = f"{_with_article(subject.noun)} {BACKGROUNDS[background].phrases[0]}"
        pictures.append(TuningScene(picture, mask.astype(np.uint8) * 255, caption))
    return pictures


def _with_article(noun: str) -> str:
    return noun if is_plural(noun) else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _fractions(box: Sequence[float]) -> Box:
    x0, y0, x1, y1 = (value / SIZE for value in box)
    return x0, y0, x1, y1


def seen_in_a_scene(cutout: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A cut-out large on a random background: picture (3, SIZE, SIZE) and its box (4,)."""
    side = float(rng.uniform(0.6, 0.8))
    placement = Placement(cutout, (0.5, 0.5), side)
    picture, masks = compose([placement], str(rng.choice(list(BACKGROUNDS))), int(rng.integers(BACKGROUND_POOL)), SIZE)
    return as_tensor(picture), torch.tensor(_fractions(box_of(masks[0])))


def in_another_hue(cutout: np.ndarray, turn: float) -> np.ndarray:
    """The same thing in another colour: hues turned by `turn` of the circle, grey and black parts tinted to show it.

    Args:
        cutout: (h, w, 4) uint8 RGBA.
        turn: 0..1.
    """
    hsv = cv2.cvtColor(cutout[..., :3], cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0].astype(int) + round(180 * turn)) % 180
    hsv[..., 1:] = np.maximum(hsv[..., 1:], 110)
    return np.dstack([cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), cutout[..., 3]])


class Galleries:
    """Codes of the pictures among which a subject is to be found."""

    def __init__(self, archive: SubjectArchive, judges: Judges, subjects: Sequence[ToyboxSubject]) -> None:
        self.archive, self.judges = archive, judges
        self.world = ToyboxWorld("heldout", archive=archive)
        families: dict[str, ToyboxSubject] = {}
        for split in ("heldout", "val", "train"):
            for subject in archive.of_split(split):
                families.setdefault(subject.family, subject)
        chosen = {subject.family: subject for subject in subjects}
        self.others = [chosen.get(family, subject) for family, subject in families.items()][: 3 * GALLERY]
        rng = np.random.default_rng(7)
        self.codes = self._describe([self._another(subject, rng) for subject in self.others])

    def of(self, subject: ToyboxSubject) -> Tensor:
        """(GALLERY, D): row 0 is another render of the subject."""
        rng = np.random.default_rng((8, int.from_bytes(subject.id.encode()[:7])))
        cutout = self.archive.cutout(subject.id)
        hues = [in_another_hue(cutout, (k + 1) / (HARD_NEGATIVES + 1)) for k in range(HARD_NEGATIVES)]
        near = self._describe([self._view(view, rng) for view in (cutout, *hues)])
        strangers = [i for i, other in enumerate(self.others) if other.family != subject.family]
        picked = rng.permutation(strangers)[: GALLERY - 1 - HARD_NEGATIVES]
        return torch.cat([near, self.codes[torch.from_numpy(picked)]])

    def _another(self, subject: ToyboxSubject, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        return self._view(self.archive.cutout(subject.id), rng)

    def _view(self, cutout: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        return seen_in_a_scene(self.world.reference(cutout, rng), rng)

    def _describe(self, views: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        pictures, boxes = zip(*views, strict=True)
        return self.judges.describe(torch.stack(pictures), torch.stack(boxes))


class BackgroundJudge:
    """Names a picture's background: that of the painting which is nearest to it outside the boxes.

    No network: pictures are compared as 16 x 16 cells with twelve paintings of every background.
    """

    def __init__(self) -> None:
        self.names = [name for name in BACKGROUNDS for _ in range(PAINTINGS)]
        painted = [as_tensor(paint_background(name, i, SIZE)) for name in BACKGROUNDS for i in range(PAINTINGS)]
        self.paintings = _coarse(torch.stack(painted))  # (P, 3, COARSE, COARSE)

    def name(self, picture: Tensor, boxes: Sequence[Box]) -> str:
        """The background of a picture (3, SIZE, SIZE) in 0..1 whose subjects stand in `boxes`."""
        outside = torch.ones(COARSE, COARSE)
        for x0, y0, x1, y1 in boxes:
            rows = slice(int(y0 * COARSE), int(np.ceil(y1 * COARSE)) + 1)  # one more for the shadow
            outside[rows, int(x0 * COARSE) : int(np.ceil(x1 * COARSE))] = 0
        distance = ((self.paintings - _coarse(picture[None])).abs() * outside).sum(dim=(1, 2, 3))  # (P,)
        return self.names[int(distance.argmin())]


def _coarse(pictures: Tensor) -> Tensor:
    return functional.adaptive_avg_pool2d(pictures, COARSE)
