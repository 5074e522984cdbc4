"""Detection by a CLIP: regions that stand out are cut out of the picture and compared with the caption's phrases.

Stage `detect`, backend `clip_proposals`, for machines that have an open_clip model but no detector. The chance of a
phrase is a softmax over the caption's phrases and some negatives, as in zero-shot classification (Radford et al.,
2021); a score is the geometric mean of its root and of how stable the region is. Which box goes to which phrase is
decided for the whole picture (`placement.py`). It does well on a few clear things, and is no match for a detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, field_validator

from data_pipeline.record import Provenance
from data_pipeline.settings import Settings
from data_pipeline.stages import BoxScores, NounChunk, Picture
from data_pipeline.stages.pretrained import DtypeName, resolve_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.stages.detect.clip_folder import LoadedClip

PHRASES_KEPT = 10_000  # encodings of phrases, which come again and again


class ClipProposalsSettings(Settings):
    """Settings of the backend."""

    backend: Literal["clip_proposals"] = "clip_proposals"
    model: str = "ViT-B-32/laion2b_s34b_b79k"  # open_clip folder, hub id, or ARCHITECTURE/TAG of open_clip's list
    revision: str | None = None  # commit, tag or branch of a hub id
    dtype: DtypeName = "float32"
    batch_size: int = Field(8, ge=1)  # pictures at once, each with up to `proposals` regions
    proposals: int = Field(16, ge=1, le=200)  # regions of a picture
    margin: float = Field(0.12, ge=0, le=2)  # how much more than its box is seen of a region, share of the longer side
    prompt: str = "a photo of a {phrase}"  # what is compared with a region
    negatives: tuple[str, ...] = ("a photo of the background", "a photo of nothing")  # texts that no phrase stands for
    min_score: float = Field(0.25, gt=0, le=1)  # a phrase rather has no box than one that fits less

    @field_validator("prompt")
    @classmethod
    def _has_phrase(cls, prompt: str) -> str:
        if "{phrase}" not in prompt:
            raise ValueError("expected a text with {phrase} in it")
        return prompt

    def load(self, device: str) -> ClipProposalDetector:
        """The detector on that device.

        Raises:
            UserError: the model cannot be had, or is no open_clip model.
        """
        from data_pipeline.stages.detect.clip_folder import load_clip

        loaded, provenance = load_clip(self.model, self.revision, device, resolve_dtype(self.dtype, device))
        return ClipProposalDetector(loaded, provenance, self)


class ClipProposalDetector:
    """Finds what the chunks name among the regions of a picture."""

    def __init__(self, loaded: LoadedClip, provenance: Provenance, settings: ClipProposalsSettings) -> None:
        self.loaded, self.provenance, self.settings = loaded, provenance, settings
        self.encode_text = lru_cache(maxsize=PHRASES_KEPT)(self._encode_text)

    def detect(self, pictures: Sequence[Picture], chunks: Sequence[Sequence[NounChunk]]) -> list[BoxScores]:
        from data_pipeline.stages.detect.region_proposals import propose_boxes

        boxes, stabilities = [], []
        for picture in pictures:
            proposed, stability = propose_boxes(picture, self.settings.proposals)
            able = stability >= self.settings.min_score**2  # the others stay below it even with a chance of 1
            boxes.append(proposed[able])
            stabilities.append(stability[able])
        return self.score_boxes(pictures, boxes, stabilities, chunks)

    def score_boxes(
        self,
        pictures: Sequence[Picture],
        boxes: Sequence[np.ndarray],
        stabilities: Sequence[np.ndarray],
        chunks: Sequence[Sequence[NounChunk]],
    ) -> list[BoxScores]:
        """Which of these boxes (Q, 4), stabilities (Q,) 0..1, show the chunks of each picture."""
        regions = self.encode_regions(pictures, boxes)
        found = []
        for picture, box, stability, codes, named in zip(pictures, boxes, stabilities, regions, chunks, strict=True):
            # a softmax is all but 0 or 1 where stability is not: its root is taken, or it would decide alone
            scores = np.sqrt(stability[:, None] * np.sqrt(self.chances(codes, named)))
            found.append(self._placed(box, scores, picture, named))
        return found

    def encode_regions(self, pictures: Sequence[Picture], boxes: Sequence[np.ndarray]) -> list[Tensor]:
        """Unit vectors of the regions in boxes (Q, 4) of each picture: (Q, D) each."""
        import torch

        from data_pipeline.stages.detect.region_proposals import cut_regions

        size, margin = self.loaded.image_size, self.settings.margin
        crops = [cut_regions(picture, q, size, margin) for picture, q in zip(pictures, boxes, strict=True)]
        counts = [len(part) for part in crops]
        if not sum(counts):
            return [torch.zeros(0, 1) for _ in pictures]
        with torch.inference_mode():
            codes = self.loaded.clip.encode_image(self.loaded.pixels(np.concatenate(crops)), normalize=True)
        return list(codes.float().cpu().split(counts))

    def chances(self, codes: Tensor, chunks: Sequence[NounChunk]) -> np.ndarray:
        """Regions (Q, D) and C chunks -> (Q, C): how likely each region shows each chunk.

        Chunks of one noun ("a dog … another dog") are one answer: each has the chance of all of them.
        """
        import torch

        if not len(codes) or not chunks:
            return np.zeros((len(codes), len(chunks)), np.float32)
        texts = [self.settings.prompt.format(phrase=chunk.text) for chunk in chunks]
        known = torch.stack([self.encode_text(text) for text in (*texts, *self.settings.negatives)])  # (C + N, D)
        logits = self.loaded.clip.logit_scale.exp().float().cpu() * codes @ known.T
        each = logits.softmax(dim=1)[:, : len(chunks)].numpy()
        nouns = np.array([chunk.noun for chunk in chunks])
        return each @ (nouns[:, None] == nouns).astype(np.float32)

    def _encode_text(self, text: str) -> Tensor:
        import torch

        with torch.inference_mode():
            ids = self.loaded.tokenize([text]).to(self.loaded.mean.device)
            return self.loaded.clip.encode_text(ids, normalize=True)[0].float().cpu()

    def _placed(
        self, boxes: np.ndarray, scores: np.ndarray, picture: Picture, chunks: Sequence[NounChunk]
    ) -> BoxScores:
        """The boxes that were given to a chunk, each with the score of that chunk only."""
        from data_pipeline.stages.detect.placement import place_chunks

        height, width = picture.shape[:2]
        pairs = place_chunks(scores, boxes.astype(np.float64), (width, height), chunks, self.settings.min_score)
        rows, columns = np.asarray(pairs, int).reshape(-1, 2).T
        kept = np.zeros((len(pairs), len(chunks)), np.float32)
        kept[np.arange(len(pairs)), columns] = scores[rows, columns]
        return BoxScores(boxes[rows], kept, kept.copy())
