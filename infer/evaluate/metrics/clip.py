"""CLIP scores (Radford et al., ICML 2021): does a picture show what the prompt says, and its subjects?

CLIP-T is the raw cosine of picture and prompt (without placeholder, neither times 2.5 nor times 100), CLIP-I that of
picture and photos. Both conventions of the papers stand side by side: against the given photos, against all.
"""

from __future__ import annotations

from collections.abc import Sequence

from infer.evaluate.backbones import ClipBackbone, against_photos, load_clip
from infer.evaluate.cases import Protocol
from infer.evaluate.crops import Finder, crop_scores, load_finder
from infer.evaluate.metrics import Column, Drawn
from infer.evaluate.settings import EvaluateSettings


class ClipMetric:
    """Text and picture scores; bare class words have only the former."""

    def __init__(self, backbone: ClipBackbone, finder: Finder | None) -> None:
        self.backbone, self.finder = backbone, finder
        name = backbone.name
        self.columns: tuple[Column, ...] = (
            Column("clip_t", "CLIP-T", "Cosine of the picture and its prompt.", backbone=name, role="prompt"),
            Column(
                "clip_i", "CLIP-I", "Cosine of the picture and the given photos, mean over subjects.", backbone=name
            ),
            Column(
                "clip_i_all",
                "CLIP-I, all photos",
                "Cosine of the picture and all photos of its subject, mean over subjects.",
                backbone=name,
            ),
        )
        if finder:
            self.columns += (
                Column(
                    "clip_i_crop",
                    "CLIP-I, crop",
                    "Cosine of a subject's crop and its given photos, of the worst subject; 0 if one is missing.",
                    backbone=name,
                ),
            )

    def score(self, drawn: Sequence[Drawn]) -> list[dict[str, float]]:
        codes = self.backbone.images([one.picture for one in drawn])  # (N, D)
        prompts = list(dict.fromkeys(one.case.prompt for one in drawn))
        texts = dict(zip(prompts, self.backbone.texts(prompts), strict=True))
        rows = []
        for one, code in zip(drawn, codes, strict=True):
            row = {"clip_t": float(code @ texts[one.case.prompt])}
            if one.case.subjects:
                row["clip_i"], row["clip_i_all"] = against_photos(code, one.case.subjects, self.backbone)
            rows.append(row)
        if self.finder:
            for row, score in zip(rows, crop_scores(drawn, self.finder, self.backbone), strict=True):
                row |= {} if score is None else {"clip_i_crop": score}
        return rows


def create(settings: EvaluateSettings, protocol: Protocol) -> ClipMetric:
    return ClipMetric(load_clip(settings.backbones.clip, settings.device), load_finder(settings))
