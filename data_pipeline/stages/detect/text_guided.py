"""A detector that reads what to look for (Grounding DINO, Liu et al., ECCV 2024), around either project's network.

Pictures are never padded. Both projects offer a mask for padding, but it reaches only the transformer: the windows of
the Swin backbone and the group norms behind it take padding for picture. On a network with random weights 32 pixels of
it moved scores by 0.13 and group-normed features by one deviation. So pictures of one size go through the network
together, and sides are rounded to `Sides.multiple` so that most pictures have one of a few sizes.
Texts of several lengths are padded: their masks hold (batched equals single to 1e-5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.transforms.v2 import functional as transforms
from transformers.image_transforms import get_size_with_aspect_ratio

from data_pipeline.record import Provenance
from data_pipeline.stages import BoxScores, NounChunk, Picture
from data_pipeline.stages.detect.chunk_scores import MAX_TOKENS, phrase_text, score_chunks, token_indices

STRIDES = (8, 16, 32, 64)  # of the feature maps whose cells the network chooses its boxes from
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# pixels (N, 3, H, W) and one text each -> logits (N, Q, L) of each token in each box, boxes (N, Q, 4) cxcywh, fractions
Network = Callable[[Tensor, list[str]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sides:
    """The size at which the network looks at a picture."""

    shortest: int  # pixels of the shorter side …
    longest: int  # … unless the longer one would be longer than this
    multiple: int  # of which both sides are whole multiples
    boxes: int  # that the network chooses; it needs as many cells

    def of(self, height: int, width: int) -> tuple[int, int]:
        """Height and width for a picture of that size.

        The shape changes by at most half a multiple a side; the shorter side of an extreme panorama grows until the
        feature maps have enough cells.
        """
        sides = get_size_with_aspect_ratio((height, width), self.shortest, self.longest)
        tall, wide = (max(self.multiple, self.multiple * round(side / self.multiple)) for side in sides)
        while sum(math.ceil(tall / stride) * math.ceil(wide / stride) for stride in STRIDES) < self.boxes:
            tall, wide = (tall + self.multiple, wide) if tall <= wide else (tall, wide + self.multiple)
        return tall, wide


class TextGuidedDetector:
    """Finds what the chunks name; scores are those of each chunk's own tokens."""

    def __init__(
        self,
        network: Network,
        tokenizer: Any,
        sides: Sides,
        provenance: Provenance,
        device: str,
        dtype: torch.dtype,
        max_tokens: int = MAX_TOKENS,
        mean: Sequence[float] = IMAGENET_MEAN,
        deviation: Sequence[float] = IMAGENET_DEVIATION,
    ) -> None:
        self.provenance = provenance
        self._network, self._tokenizer, self._sides, self._max_tokens = network, tokenizer, sides, max_tokens
        self._device, self._dtype, self._mean, self._deviation = device, dtype, [*mean], [*deviation]

    @torch.inference_mode()
    def detect(self, pictures: Sequence[Picture], chunks: Sequence[Sequence[NounChunk]]) -> list[BoxScores]:
        """Candidate boxes of each picture, and how well each of its chunks fits each of them.

        Chunks that say nothing ("the", "…") or stand beyond the network's longest text score 0; a picture that has no
        others gets no boxes.
        """
        asked = [phrase_text([chunk.text for chunk in own], self._tokenizer, self._max_tokens) for own in chunks]
        found = [
            BoxScores(np.zeros((0, 4), np.float32), *(np.zeros((0, len(own)), np.float32) for _ in range(2)))
            for own in chunks
        ]
        like: dict[tuple[int, int], list[int]] = {}  # size -> numbers of the pictures that are looked at in it
        for number, (picture, text) in enumerate(zip(pictures, asked, strict=True)):
            if text.spans:
                like.setdefault(self._sides.of(*picture.shape[:2]), []).append(number)
        for size, numbers in like.items():
            pixels = torch.stack([self._pixels(pictures[number], size) for number in numbers])  # (N, 3, H, W)
            texts = [asked[number].text for number in numbers]
            offsets = self._tokenizer(texts, padding=True, return_offsets_mapping=True)["offset_mapping"]
            logits, boxes = self._network(pixels.to(self._dtype), texts)  # (N, Q, L), (N, Q, 4)
            for row, number in enumerate(numbers):
                own = token_indices(asked[number].spans, offsets[row])
                indices = [own[slot] if slot is not None else [] for slot in asked[number].slots]
                found[number] = _box_scores(logits[row], boxes[row], indices, pictures[number])
        return found

    def _pixels(self, picture: Picture, size: tuple[int, int]) -> Tensor:
        """The picture as the network looks at it, (3, H, W) float32; shrinking is filtered, in 8 bits as published."""
        whole = torch.tensor(picture).permute(2, 0, 1).to(self._device)
        small = transforms.resize(whole, [*size], antialias=True)
        return transforms.normalize(small.float() / 255, self._mean, self._deviation)


def _box_scores(logits: Tensor, boxes: Tensor, indices: Sequence[Sequence[int]], picture: Picture) -> BoxScores:
    """What the network says of one picture, in pixels of that picture."""
    height, width = picture.shape[:2]
    corners = box_convert(boxes.float(), "cxcywh", "xyxy").clamp(0, 1)  # (Q, 4)
    in_pixels = corners * corners.new_tensor([width, height, width, height])
    token_scores, chunk_scores = score_chunks(logits, indices)  # (Q, C) each
    return BoxScores(in_pixels.cpu().numpy(), token_scores.cpu().numpy(), chunk_scores.cpu().numpy())
