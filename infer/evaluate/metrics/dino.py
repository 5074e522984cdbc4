"""DINO scores (Caron et al., ICCV 2021; as an identity score: Ruiz et al., DreamBooth, CVPR 2023), and the copy index.

DINO was trained to tell pictures of one class apart, so it notices another dog where CLIP-I does not. It notices the
same background as well: the copy index tells how much of a score is likeness to the given photo and no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from torch import Tensor

from infer.evaluate.backbones import DinoBackbone, against_photos, load_dino
from infer.evaluate.cases import EvaluatedSubject, Protocol
from infer.evaluate.crops import Finder, crop_scores, load_finder
from infer.evaluate.metrics import Column, Drawn
from infer.evaluate.settings import EvaluateSettings


class DinoMetric:
    """Identity of the subjects; bare class words have none."""

    def __init__(self, backbone: DinoBackbone, finder: Finder | None) -> None:
        self.backbone, self.finder = backbone, finder
        name = backbone.name
        self.columns: tuple[Column, ...] = (
            Column(
                "dino",
                "DINO",
                "Cosine of the picture and the given photos, mean over subjects.",
                backbone=name,
                role="subject",
            ),
            Column(
                "dino_all",
                "DINO, all photos",
                "Cosine of the picture and all photos of its subject, mean over subjects.",
                backbone=name,
            ),
            Column(
                "copy",
                "copy index",
                "Similarity to the given photos minus that to the subject's other photos.",
                better="lower",
                backbone=name,
            ),
        )
        if finder:
            self.columns += (
                Column(
                    "dino_crop",
                    "DINO, crop",
                    "Cosine of a subject's crop and its given photos, of the worst subject; 0 if one is missing.",
                    backbone=name,
                ),
            )

    def score(self, drawn: Sequence[Drawn]) -> list[dict[str, float]]:
        rows: list[dict[str, float]] = [{} for _ in drawn]
        shown = [(row, one) for row, one in zip(rows, drawn, strict=True) if one.case.subjects]
        if not shown:
            return rows
        asked = [one for _, one in shown]
        for (row, one), code in zip(shown, self.backbone.images([one.picture for one in asked]), strict=True):
            row["dino"], row["dino_all"] = against_photos(code, one.case.subjects, self.backbone)
            copying = [self._copying(code, subject) for subject in one.case.subjects if subject.others]
            row |= {"copy": fmean(copying)} if copying else {}
        if self.finder:
            for (row, _), score in zip(shown, crop_scores(asked, self.finder, self.backbone), strict=True):
                row |= {} if score is None else {"dino_crop": score}
        return rows

    def _copying(self, code: Tensor, subject: EvaluatedSubject) -> float:
        similarity = self.backbone.photos(subject) @ code  # (P,)
        return float(similarity[: subject.given].mean() - similarity[subject.given :].mean())


def create(settings: EvaluateSettings, protocol: Protocol) -> DinoMetric:
    return DinoMetric(load_dino(settings.backbones.dino, settings.device), load_finder(settings))
