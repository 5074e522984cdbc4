"""What only the toybox can know: whether the very subject was drawn, at its place, on the background asked for.

Two judges, trained apart from all they judge (`judges.py`), and the truth of each request (`toybox_truth.py`).
Identity is looked for where the method says its subjects stand or, with `crops: detected`, where the segmenter sees
things: for methods that cannot be told places. Place and background are held against what was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.toybox.archive import SubjectArchive
from infer.evaluate.backbones import title
from infer.evaluate.cases import Protocol
from infer.evaluate.judges import Judges, boxes_of_things
from infer.evaluate.methods.copied_reference import FRAME
from infer.evaluate.metrics import Column, Drawn
from infer.evaluate.scores import found_first, placement
from infer.evaluate.settings import EvaluateSettings
from infer.evaluate.toybox_truth import GALLERY, SIZE, BackgroundJudge, Galleries, Request, held_out_subjects
from infer.loading import SHIPPED
from infer.subjects import Box
from model.reference import prepare_reference
from train.data.scenes import as_tensor


class ToyboxTruth:
    """The judges, and the galleries among which a subject is to be found, rendered when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.judges = Judges.load(folder)
        self._of_subject: dict[str, Tensor] = {}

    @cached_property
    def backgrounds(self) -> BackgroundJudge:
        return BackgroundJudge()

    @cached_property
    def _galleries(self) -> Galleries:
        archive = SubjectArchive()
        return Galleries(archive, self.judges, held_out_subjects(archive, len(archive.subjects)))

    def galleries(self, request: Request) -> list[Tensor]:
        """(GALLERY, D) for each subject of a request; row 0 is another render of it."""
        for subject in request.subjects:
            if subject.id not in self._of_subject:
                self._of_subject[subject.id] = self._galleries.of(subject)
        return [self._of_subject[subject.id] for subject in request.subjects]

    def given(self, request: Request) -> Tensor:
        """Codes (S, D) of the references as methods see them."""
        frames = torch.stack([prepare_reference(reference, SIZE) for reference in request.references])
        return self.judges.describe(frames, torch.tensor([FRAME]).expand(len(frames), -1))


@lru_cache(maxsize=1)
def load_truth(judges: Path | None) -> ToyboxTruth:
    """The truth as those judges see it; built once a process.

    Args:
        judges: folder with identity/ and segment/; None: the shipped ones.
    Raises:
        UserError: they cannot be read.
    """
    return ToyboxTruth(judges or SHIPPED / "toybox" / "judges")


def judge_name(judges: Path | None) -> str:
    """What to call the judges beside numbers."""
    return "toybox judges" if judges is None else title(str(judges))


class ToyboxMetric:
    """Scores pictures of cases whose `truth` is a `Request`."""

    def __init__(self, truth: ToyboxTruth, name: str, detected: bool = False) -> None:
        """
        Args:
            name: of the judges, written beside the numbers.
            detected: look for subjects where the segmenter sees them, whatever the method says.
        """
        self.truth, self.detected = truth, detected
        self.columns = (
            Column(
                "identity",
                "identity",
                "Cosine of the subject in the picture and another render of it, mean over subjects.",
                backbone=name,
                role="subject",
            ),
            Column(
                "found",
                "retrieval@1",
                f"1 if the subject is nearer to another render of it than to {GALLERY - 1} other things; of two, both.",
                backbone=name,
            ),
            Column(
                "identity_copy",
                "copy index",
                "Similarity to the given reference minus that to another render, mean over subjects.",
                better="lower",
                backbone=name,
            ),
            Column(
                "placement", "placement", "IoU of the boxes asked for and those seen, mean over them.", backbone=name
            ),
            Column(
                "background", "background", "1 if the background is recognised as the one asked for.", role="prompt"
            ),
        )

    def score(self, drawn: Sequence[Drawn]) -> list[dict[str, float]]:
        rows: list[dict[str, float]] = [{} for _ in drawn]
        judged = [(row, one) for row, one in zip(rows, drawn, strict=True) if isinstance(one.case.truth, Request)]
        if not judged:
            return rows
        pictures = torch.stack([small_picture(one.picture) for _, one in judged])  # (N, 3, SIZE, SIZE)
        masks = self.truth.judges.subject_masks(pictures)  # (N, SIZE, SIZE)
        for (row, one), picture, mask in zip(judged, pictures, masks, strict=True):
            request: Request = one.case.truth
            things = boxes_of_things(mask)
            row |= self._identity(picture, request, things if self.detected else one.places or request.boxes)
            row["placement"] = placement(request.boxes, things)
            recognised = self.truth.backgrounds.name(picture, request.boxes)
            row["background"] = float(recognised == request.background)
        return rows

    def _identity(self, picture: Tensor, request: Request, places: Sequence[Box]) -> dict[str, float]:
        """Scores of the subjects at the first so many places; one that has none is missing and scores 0."""
        galleries = self.truth.galleries(request)
        count = min(len(places), len(galleries))
        if not count:
            return {"identity": 0.0, "found": 0.0}
        boxes = torch.tensor(places[:count])  # (P, 4)
        codes = self.truth.judges.describe(picture.expand(count, -1, -1, -1), boxes)  # (P, D)
        alike = torch.stack([gallery[0] for gallery in galleries]) @ codes.T  # (S, P)
        # Things that were seen come without names: each subject is the one that it is most like, all in all.
        shown = linear_sum_assignment(alike, maximize=True) if self.detected else (range(count), range(count))
        pairs = [(int(subject), int(place)) for subject, place in zip(*shown, strict=True)]
        given = self.truth.given(request)  # (S, D)
        found = [found_first(codes[place], galleries[subject]) for subject, place in pairs]
        return {
            "identity": sum(float(alike[pair]) for pair in pairs) / len(galleries),
            "found": float(all(found) and len(found) == len(galleries)),
            "identity_copy": fmean(float(given[s] @ codes[p] - alike[s, p]) for s, p in pairs),
        }


def small_picture(picture: Image.Image) -> Tensor:
    """(3, SIZE, SIZE) in 0..1: as the judges were trained to see it."""
    shown = picture.convert("RGB")
    if shown.size != (SIZE, SIZE):
        shown = shown.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return as_tensor(np.array(shown))


def create(settings: EvaluateSettings, protocol: Protocol) -> ToyboxMetric:
    if not any(isinstance(case.truth, Request) for case in protocol.cases):
        raise UserError(
            f"it can judge only protocol.kind=toybox, not {settings.protocol.kind}; leave it out of metrics"
        )
    truth, name = load_truth(settings.backbones.judges), judge_name(settings.backbones.judges)
    return ToyboxMetric(truth, name, settings.crops == "detected")
