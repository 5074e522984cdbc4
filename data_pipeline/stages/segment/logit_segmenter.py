"""What both SAM backends share: the decoder's logits of a batch, scaled up to the stored pictures and cut at 0."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from data_pipeline.record import BoxPx
from data_pipeline.stages import Picture

if TYPE_CHECKING:
    from torch import Tensor


class LogitSegmenter(ABC):
    """A segmenter that answers with logits on a square of its own."""

    def segment(self, pictures: Sequence[Picture], boxes: Sequence[Sequence[BoxPx]]) -> list[np.ndarray]:
        """For each picture (N, H, W) bool, one mask a box."""
        import torch

        if not sum(map(len, boxes)):
            return [np.zeros((0, *picture.shape[:2]), bool) for picture in pictures]
        with torch.inference_mode():
            found = self.logits(pictures, boxes)
            return [
                self._at_stored_size(logits, seen, picture.shape[:2])
                for picture, (logits, seen) in zip(pictures, found, strict=True)
            ]

    @abstractmethod
    def logits(
        self, pictures: Sequence[Picture], boxes: Sequence[Sequence[BoxPx]]
    ) -> list[tuple[Tensor, tuple[int, int]]]:
        """What the decoder says, before it is scaled up; at least one box in all.

        Returns:
            for each picture (N, L, L) float32 with the padding, and the height and width that the picture has in the
            network's square, which is four times as large (1024 and L = 256 in the published models).
        """

    @abstractmethod
    def _at_stored_size(self, logits: Tensor, seen: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
        """Logits (N, L, L) as masks (N, H, W) of the stored size."""
