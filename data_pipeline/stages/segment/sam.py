"""Masks by SAM (Kirillov et al., Segment Anything, ICCV 2023) as transformers has it. Stage `segment`, backend `sam`.

Nearly all of the time goes into the image encoder, which takes the pictures as one batch and alone is computed in
`dtype`. Prompts and masks stay in float32: bfloat16 moves a box by up to four pixels. The decoder copies a picture's
embedding for each box anyway, so it is given one embedding a box: the boxes of all pictures, however many each has, go
through it together. SamHQModel and Sam2Model are other networks with other inputs; they would be backends of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.record import BoxPx, Provenance
from data_pipeline.settings import Settings
from data_pipeline.stages import Picture
from data_pipeline.stages.pretrained import DtypeName, Pretrained, find_pretrained, resolve_dtype
from data_pipeline.stages.segment.logit_segmenter import LogitSegmenter

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class SamSettings(Settings):
    """SAM through transformers."""

    backend: Literal["sam"] = "sam"
    model: str = "facebook/sam-vit-base"  # folder or hub id; sam-vit-large and sam-vit-huge are better and slower
    revision: str | None = None  # branch, tag or commit of a hub id; null: its main branch
    dtype: DtypeName = "auto"  # of the image encoder; auto: float32 on a CPU, a half on accelerators
    batch_size: int = Field(4, ge=1)  # pictures at once
    boxes_per_call: int = Field(32, ge=1)  # boxes that the decoder takes at once; each needs about 50 MiB

    def load(self, device: str) -> SamSegmenter:
        """The segmenter on a device.

        Raises:
            UserError: the model cannot be had, is no SAM, or its files do not fit each other.
        """
        import torch
        from transformers import SamImageProcessor, SamModel

        found = find_pretrained("segment.model", self.model, self.revision)
        network: Any = found.network(SamModel, ("sam",), device, torch.float32)
        network.vision_encoder.to(resolve_dtype(self.dtype, device))  # weights are read as float32 and cast here
        return SamSegmenter(found, network, found.processor(SamImageProcessor), self)


class SamSegmenter(LogitSegmenter):
    """Cuts out what a box holds; a mask may reach a little beyond its box, and may be empty."""

    def __init__(self, found: Pretrained, network: Any, processor: Any, settings: SamSettings) -> None:
        self.provenance: Provenance = found.provenance("sam")
        self.network, self.processor = network, processor
        self.dtype: torch.dtype = network.vision_encoder.dtype
        self.boxes_per_call = settings.boxes_per_call
        side, padded = network.config.vision_config.image_size, processor.pad_size
        if {side, processor.size["longest_edge"]} != {padded["height"], padded["width"]}:
            raise UserError(
                f"{found}: preprocessor_config.json makes pictures of {padded['height']} x {padded['width']} with "
                f"longest_edge={processor.size['longest_edge']}, and config.json says image_size={side}; expected one "
                "number everywhere"
            )

    def logits(
        self, pictures: Sequence[Picture], boxes: Sequence[Sequence[BoxPx]]
    ) -> list[tuple[Tensor, tuple[int, int]]]:
        import torch

        # All shapes in one batch: the processor makes the longer side 1024 and pads below and at the right.
        inputs = self.processor(
            list(pictures), input_data_format="channels_last", device=self.network.device, return_tensors="pt"
        )
        seen = [(int(height), int(width)) for height, width in inputs["reshaped_input_sizes"]]
        counts = [len(given) for given in boxes]
        owners = torch.repeat_interleave(torch.tensor(counts))  # (N,) which picture each box is of
        prompts = np.concatenate(
            [
                scaled(given, size, picture.shape[:2])
                for given, size, picture in zip(boxes, seen, pictures, strict=True)
                if len(given)
            ]
        )  # (N, 4)
        embeddings = self.network.get_image_embeddings(inputs["pixel_values"].to(self.dtype)).float()  # (B, C, h, w)
        parts = [
            self.network(
                image_embeddings=embeddings[owner.to(embeddings.device)],  # (n, C, h, w)
                input_boxes=part[:, None].to(embeddings.device),  # (n, 1, 4)
                multimask_output=False,
            ).pred_masks[:, 0, 0]  # (n, L, L)
            for owner, part in zip(
                owners.split(self.boxes_per_call), torch.from_numpy(prompts).split(self.boxes_per_call), strict=True
            )
        ]
        return list(zip(torch.cat(parts).split(counts), seen, strict=True))

    def _at_stored_size(self, logits: Tensor, seen: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
        """(N, H, W) bool; one mask at a time, since all of a large picture's in float32 are much memory."""
        masks = np.zeros((len(logits), *size), bool)
        for mask, low in zip(masks, logits, strict=True):
            (grown,) = self.processor.post_process_masks([low[None, None]], [tuple(size)], [seen])  # (1, 1, H, W)
            mask[:] = grown[0, 0].cpu().numpy()
        return masks


def scaled(boxes: Sequence[BoxPx], seen: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
    """Boxes of a stored picture in pixels of what the network sees, (N, 4) float32.

    Args:
        seen: height and width there; both were rounded, so the two scales differ a little.
        size: height and width as stored.
    """
    ratios = [seen[1] / size[1], seen[0] / size[0]] * 2
    return (np.array(boxes, np.float64).reshape(-1, 4) * ratios).astype(np.float32)
