"""Masks by SAM (Kirillov et al., ICCV 2023) in Meta's own package. Stage `segment`, backend `segment_anything`.

The package's `SamPredictor` takes one picture at a time and its registry unpickles checkpoints. Here the pictures go
through the image encoder as one batch, all boxes of a picture through one call of the decoder, and weights are read as
tensors only. As in `sam.py` the image encoder alone is computed in `dtype`.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.record import BoxPx, Provenance
from data_pipeline.settings import Settings
from data_pipeline.stages import Picture
from data_pipeline.stages.pretrained import DtypeName, content_hash, one_line_errors, resolve_dtype, usable_device
from data_pipeline.stages.segment.logit_segmenter import LogitSegmenter

if TYPE_CHECKING:
    import torch
    from segment_anything.modeling import Sam
    from torch import Tensor


class SegmentAnythingSettings(Settings):
    """SAM through segment-anything."""

    backend: Literal["segment_anything"] = "segment_anything"
    model: str  # checkpoint, .pth as Meta publishes it (sam_vit_h_4b8939.pth) or its tensors as .safetensors
    model_type: Literal["vit_h", "vit_l", "vit_b"] = "vit_h"  # huge, large or base; what the checkpoint holds
    dtype: DtypeName = "auto"  # of the image encoder; auto: float32 on a CPU, a half on accelerators
    batch_size: int = Field(4, ge=1)  # pictures at once
    boxes_per_call: int = Field(32, ge=1)  # boxes of a picture that the decoder takes at once; each needs about 50 MiB

    def load(self, device: str) -> SegmentAnythingSegmenter:
        """The segmenter on a device.

        Raises:
            UserError: no such checkpoint, or it is not of that type.
        """
        try:
            from segment_anything import sam_model_registry
        except ImportError as error:
            raise UserError(
                f"segment.backend=segment_anything: the package is not there ({error}); "
                "pip install segment-anything, or take segment.backend=sam"
            ) from error
        checkpoint = Path(self.model).expanduser()
        weights = read_weights(checkpoint)
        return SegmentAnythingSegmenter(sam_model_registry[self.model_type](), weights, checkpoint, self, device)


class SegmentAnythingSegmenter(LogitSegmenter):
    """Cuts out what a box holds; a mask may reach a little beyond its box, and may be empty."""

    def __init__(
        self, sam: Sam, weights: dict[str, Tensor], checkpoint: Path, settings: SegmentAnythingSettings, device: str
    ) -> None:
        """Takes over `weights`.

        Raises:
            UserError: `sam` is another network than the one they are of, or the device cannot be used.
        """
        from segment_anything.utils.transforms import ResizeLongestSide

        missing, unexpected = _differences(sam, weights)
        if missing or unexpected:
            what = f"lacks {missing[0]}" if missing else f"holds {unexpected[0]} besides"
            raise UserError(
                f"segment.model={settings.model}: is no SAM of segment.model_type={settings.model_type} ({what}; "
                f"{len(missing) + len(unexpected)} such differences); give the type that it is of"
            )
        sam.load_state_dict(weights)
        self.sam = sam.to(usable_device(device)).eval().requires_grad_(False)
        self.dtype: torch.dtype = resolve_dtype(settings.dtype, device)
        self.sam.image_encoder.to(self.dtype)
        self.look = ResizeLongestSide(self.sam.image_encoder.img_size)
        self.boxes_per_call = settings.boxes_per_call
        self.provenance = Provenance("segment_anything", checkpoint.name, content_hash([checkpoint]))

    def logits(
        self, pictures: Sequence[Picture], boxes: Sequence[Sequence[BoxPx]]
    ) -> list[tuple[Tensor, tuple[int, int]]]:
        import torch

        resized = [torch.from_numpy(self.look.apply_image(picture)) for picture in pictures]  # (h, w, 3) uint8 each
        pixels = torch.stack([self.sam.preprocess(one.to(self.sam.device).permute(2, 0, 1)) for one in resized])
        embeddings = self.sam.image_encoder(pixels.to(self.dtype)).float()  # (B, C, h, w), of (B, 3, S, S)
        found = []
        for picture, small, given, embedding in zip(pictures, resized, boxes, embeddings, strict=True):
            prompts = self.look.apply_boxes(np.array(given, np.float64), picture.shape[:2])  # (N, 4)
            found.append((self._decode(embedding, prompts), (small.shape[0], small.shape[1])))
        return found

    def _decode(self, embedding: Tensor, prompts: np.ndarray) -> Tensor:
        """(N, L, L) from (C, h, w) and the boxes (N, 4) in pixels of what the network sees."""
        import torch

        if not len(prompts):
            return embedding.new_zeros(0, 1, 1)
        parts = []
        for part in torch.tensor(prompts, dtype=torch.float32, device=self.sam.device).split(self.boxes_per_call):
            sparse, dense = self.sam.prompt_encoder(points=None, boxes=part, masks=None)
            logits, _ = self.sam.mask_decoder(
                image_embeddings=embedding[None],
                image_pe=self.sam.prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=False,
            )  # (n, 1, L, L)
            parts.append(logits[:, 0])
        return torch.cat(parts)

    def _at_stored_size(self, logits: Tensor, seen: tuple[int, int], size: tuple[int, ...]) -> np.ndarray:
        """(N, H, W) bool; one mask at a time, since all of a large picture's in float32 are much memory."""
        masks = np.zeros((len(logits), *size), bool)
        for mask, low in zip(masks, logits, strict=True):
            grown = self.sam.postprocess_masks(low[None, None], seen, size) > self.sam.mask_threshold  # (1, 1, H, W)
            mask[:] = grown[0, 0].cpu().numpy()
        return masks


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of a .pth or .safetensors file, on the CPU; nothing else is unpickled.

    Raises:
        UserError: no such file, one of another kind, or damaged.
    """
    import torch
    from safetensors.torch import load_file

    name = f"segment.model={checkpoint}"
    if not checkpoint.is_file():
        raise UserError(f"{name}: no such file; give a checkpoint of segment-anything, such as sam_vit_h_4b8939.pth")
    if checkpoint.suffix not in (".pth", ".safetensors"):
        raise UserError(f"{name}: expected a .pth or .safetensors file")
    with one_line_errors(name):
        if checkpoint.suffix == ".safetensors":
            return load_file(checkpoint)
        try:
            weights = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError) as error:
            raise UserError(f"{name}: damaged, or holds more than tensors, which is never read") from error
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{name}: expected a file of tensors by name, as segment-anything publishes them")
    return weights


def _differences(sam: Sam, weights: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Tensors of the network that the weights lack or hold in another shape, and those that it does not have."""
    own = sam.state_dict()
    missing = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
    return missing, [name for name in weights if name not in own]
