"""How much the pictures of one subject and prompt differ: a method that pastes its reference draws one picture.

Mean of 1 - cosine, by DINO, of a picture to the others of the same prompt and other seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

from infer.evaluate.backbones import DinoBackbone, load_dino
from infer.evaluate.cases import Protocol
from infer.evaluate.metrics import Column, Drawn
from infer.evaluate.settings import EvaluateSettings


class DiversityMetric:
    """Left out where a prompt has one picture, and for bare class words."""

    def __init__(self, backbone: DinoBackbone) -> None:
        self.backbone = backbone
        self.columns = (
            Column(
                "diversity",
                "diversity",
                "1 - cosine to the other pictures of the same subject and prompt, mean over them.",
                backbone=backbone.name,
            ),
        )

    def score(self, drawn: Sequence[Drawn]) -> list[dict[str, float]]:
        rows: list[dict[str, float]] = [{} for _ in drawn]
        by_prompt: dict[str, list[int]] = {}
        for number, one in enumerate(drawn):
            if one.case.subjects:
                by_prompt.setdefault(one.case.prompt, []).append(number)
        several = [numbers for numbers in by_prompt.values() if len(numbers) > 1]
        if not several:
            return rows
        codes = self.backbone.images([one.picture for one in drawn])  # (N, D)
        for numbers in several:
            distance = (1 - codes[numbers] @ codes[numbers].T).clamp(min=0)  # (n, n)
            distance.fill_diagonal_(0)
            for number, total in zip(numbers, distance.sum(dim=1).tolist(), strict=True):
                rows[number]["diversity"] = total / (len(numbers) - 1)
        return rows


def create(settings: EvaluateSettings, protocol: Protocol) -> DiversityMetric:
    return DiversityMetric(load_dino(settings.backbones.dino, settings.device))
