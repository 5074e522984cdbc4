"""The steps from picture to record, each behind one small protocol: caption, nouns, detect, segment.

Third-party models live in thin adapters below, one file a backend, imported when they are asked for. Every method takes
a batch that fits its memory (the engine cuts batches of `batch_size`) and answers in its order; an answer does not
depend on what else is in the batch. Pictures are (H, W, 3) uint8 RGB arrays of the stored size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from data_pipeline.record import BoxPx, Provenance

Picture = np.ndarray  # (H, W, 3) uint8 RGB


@dataclass(frozen=True)
class NounChunk:
    """A noun phrase of a caption."""

    text: str  # as it stands there, from its first describing word on: "red sports car"
    noun: str  # lemma of its head: "car"
    span: tuple[int, int]  # characters of `text` in the caption
    following: str = ""  # the caption from there to the next chunk: " on the left of a "


@dataclass(frozen=True)
class BoxScores:
    """What a detector says of one picture: candidate boxes, and how well each noun chunk fits each of them."""

    boxes_xyxy_px: np.ndarray  # (Q, 4) float32, inside the picture
    token_scores: np.ndarray  # (Q, C) float32 0..1: the best of the chunk's own tokens
    chunk_scores: np.ndarray  # (Q, C) float32 0..1: the mean over the chunk's own tokens


class Captioner(Protocol):
    """Says what is in a picture."""

    provenance: Provenance

    def caption(self, pictures: Sequence[Picture], alt_texts: Sequence[str]) -> list[str]: ...


class NounFinder(Protocol):
    """Finds the noun phrases of captions."""

    provenance: Provenance

    def find(self, captions: Sequence[str]) -> list[tuple[NounChunk, ...]]: ...


class Detector(Protocol):
    """Finds what the chunks name. A picture without chunks is not given to it."""

    provenance: Provenance

    def detect(self, pictures: Sequence[Picture], chunks: Sequence[Sequence[NounChunk]]) -> list[BoxScores]: ...


class Segmenter(Protocol):
    """Cuts out what stands in boxes; all boxes of a picture at once. A picture without boxes is not given to it."""

    provenance: Provenance

    def segment(self, pictures: Sequence[Picture], boxes: Sequence[Sequence[BoxPx]]) -> list[np.ndarray]:
        """For each picture (N, H, W) bool, one mask a box, in order."""
        ...


class PictureCheck(Protocol):
    """Optional checks by name (nsfw, faces): a score for each picture, above its limit the picture is dropped."""

    provenance: Provenance

    def score(self, pictures: Sequence[Picture]) -> list[float]:
        """0..1 (nsfw: probability; faces: share of the picture that the largest face fills)."""
        ...
