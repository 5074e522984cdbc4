"""Class drift: what a method forgot of its classes, as the KID between its pictures of bare class words and another's.

Kernel inception distance (Bińkowski et al., ICLR 2018, section 4): the unbiased squared MMD with the kernel
(x . y / D + 1)^3, mean over subsets; here of DINO's features or, in the toybox, of the identity judge's codes.
Unbiased: two sets of the same kind score 0 in the mean however few they are, and often less. Both methods draw the same
cases from the same noise, which would make pictures alike that no word made alike: each half of the one is compared
with the other half of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipeline.errors import UserError
from infer.evaluate.backbones import load_dino
from infer.evaluate.judges import Judges
from infer.evaluate.metrics.toybox import judge_name, load_truth, small_picture
from infer.evaluate.settings import EvaluateSettings
from infer.evaluate.store import open_picture

SUBSET_SIZE, SUBSETS = 1000, 100  # the usual ones; fewer pictures are taken all at once
WHOLE = (0.0, 0.0, 1.0, 1.0)
BATCH = 64


@dataclass(frozen=True)
class Measure:
    """Which features pictures are compared by."""

    backbone: str  # name to be written beside the numbers
    features: Callable[[Iterable[Image.Image]], Tensor]  # N pictures -> (N, D)


def load_measure(settings: EvaluateSettings) -> Measure:
    """DINO's features; the judge's codes where the toybox is measured without DINO.

    Raises:
        UserError: that network cannot be loaded.
    """
    if "toybox" in settings.metrics and "dino" not in settings.metrics:
        truth = load_truth(settings.backbones.judges)
        return Measure(judge_name(settings.backbones.judges), partial(_judged, judges=truth.judges))
    backbone = load_dino(settings.backbones.dino, settings.device)
    return Measure(backbone.name, backbone.features)


def class_drift(pictures: Mapping[str, Sequence[Path]], settings: EvaluateSettings) -> dict[str, float]:
    """KID of each method's class pictures against those of `settings.class_drift.against`, mean of both halves.

    Args:
        pictures: files by method, called after their cases; that other method's must be among them.
    Returns:
        By method, without those with fewer than two pictures in a half; of that other one itself, between its own
        halves: what chance makes of so few pictures.
    Raises:
        UserError: nothing to compare with, a damaged picture, or a network that cannot be loaded.
    """
    against = settings.class_drift.against
    cases = dict.fromkeys(file.stem for files in pictures.values() for file in files)
    half = {case: number % 2 for number, case in enumerate(cases)}
    halves = {name: [[f for f in files if half[f.stem] == part] for part in (0, 1)] for name, files in pictures.items()}
    enough = {name: parts for name, parts in halves.items() if min(map(len, parts)) >= 2}
    if against not in enough:
        raise UserError(f"class drift: fewer than four class pictures of {against!r}, which all are compared with")
    measure = load_measure(settings)
    features = {name: [measure.features(map(open_picture, files)) for files in parts] for name, parts in enough.items()}
    return {
        name: fmean(kid(own[part], features[against][1 - part]) for part in (0, 1)) for name, own in features.items()
    }


def kid(first: Tensor, second: Tensor, subset_size: int = SUBSET_SIZE, subsets: int = SUBSETS, seed: int = 0) -> float:
    """Kernel inception distance of two sets of features; subsets are drawn in torch-fidelity's order.

    Args:
        first: (N, D).
        second: (M, D).
        subset_size: features drawn of each set at once; at most as many as the smaller set has.
        subsets: how often.
    Raises:
        ValueError: a set with fewer than two features.
    """
    size = min(subset_size, len(first), len(second))
    if size < 2:
        raise ValueError(f"KID needs two features of each set, got {len(first)} and {len(second)}")
    x, y = first.double(), second.double()
    if size == len(x) == len(y):
        return squared_mmd(x, y)  # every subset would be the whole
    random = np.random.RandomState(seed)  # the old generator, for the sake of equal numbers
    draws = [[torch.from_numpy(random.choice(len(z), size, replace=False)) for z in (x, y)] for _ in range(subsets)]
    return float(np.mean([squared_mmd(x[of_x], y[of_y]) for of_x, of_y in draws]))


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate (Bińkowski et al., equation 4) with the cubic kernel; (M, D) each."""
    count, width = x.shape

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / width + 1) ** 3

    within = sum(kernel(z, z).sum() - kernel(z, z).diagonal().sum() for z in (x, y))
    return float(within / (count * (count - 1)) - 2 * kernel(x, y).mean())


def _judged(pictures: Iterable[Image.Image], judges: Judges) -> Tensor:
    """Codes of whole pictures, of length sqrt(D): so that the kernel is (cosine + 1)^3."""
    left, parts = iter(pictures), []
    while batch := [small_picture(picture) for picture in islice(left, BATCH)]:
        parts.append(judges.describe(torch.stack(batch), torch.tensor([WHOLE]).expand(len(batch), -1)))
    codes = torch.cat(parts)  # (N, D)
    return codes * codes.shape[1] ** 0.5
