"""The two judges of the toybox, trained apart from everything they judge (`train/tasks/judge_*.py`).

The identity judge tells subjects apart by pictures of them, the segmenter says which pixels of a picture are subjects.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from data_pipeline.errors import UserError
from train.data.crops import crop_to_boxes
from train.tasks.judge_identity import IdentityJudge
from train.tasks.judge_segment import SegmentLoss

CROP = 64  # pixels, side of what the identity judge sees
BATCH = 64


@dataclass(frozen=True)
class Judges:
    """Both judges, ready to look."""

    identity: IdentityJudge
    segmenter: SegmentLoss

    @classmethod
    def load(cls, folder: Path) -> Judges:
        """Read `FOLDER/identity` and `FOLDER/segment`, as their training exports them.

        Raises:
            UserError: one of them is missing or cannot be read.
        """
        identity = IdentityJudge()
        try:
            state = load_file(folder / "identity" / "model.safetensors")
            identity.load_state_dict({name: _as_trained(value) for name, value in state.items()})
            unet = UNet2DModel.from_pretrained(folder / "segment", use_safetensors=True).float()
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"judges {folder}: expected identity/ and segment/ with weights ({reason})") from error
        return cls(identity.eval().requires_grad_(False), SegmentLoss(unet).eval().requires_grad_(False))

    @torch.no_grad()
    def describe(self, pictures: Tensor, boxes: Tensor) -> Tensor:
        """Codes of what stands in the boxes: (N, 3, H, H) in 0..1 and (N, 4) fractions -> (N, D) of unit length.

        The mean over a crop and its mirror image, so that which way a thing looks counts less.
        """
        crops = crop_to_boxes(pictures, boxes, CROP)
        codes = [self.identity(part) + self.identity(part.flip(-1)) for part in crops.split(BATCH)]
        return functional.normalize(torch.cat(codes), dim=-1)

    @torch.no_grad()
    def subject_masks(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, H) in 0..1 -> (N, H, H) bool, True where a subject is seen."""
        return torch.cat([self.segmenter.logits(part)[:, 0] > 0 for part in pictures.split(BATCH)])


def _as_trained(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def boxes_of_things(mask: Tensor, least: int = 12) -> list[tuple[float, float, float, float]]:
    """Boxes (xyxy as fractions) of the connected parts of a mask (H, H) with at least `least` pixels, largest first."""
    count, _, parts, _ = cv2.connectedComponentsWithStats(mask.cpu().numpy().astype(np.uint8), connectivity=8)
    size = mask.shape[0]
    found = sorted((part for part in parts[1:count] if part[4] >= least), key=lambda part: -part[4])
    return [(x / size, y / size, (x + w) / size, (y + h) / size) for x, y, w, h, _ in found]
