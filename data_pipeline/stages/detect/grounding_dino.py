"""Grounding DINO (Liu et al., ECCV 2024) as transformers has it; MM Grounding DINO (Zhao et al., 2024) loads too.

Stage `detect`, backend `grounding_dino`. How pictures are batched and chunks are scored: `text_guided.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from data_pipeline.settings import Settings
from data_pipeline.stages.pretrained import DtypeName, find_pretrained, resolve_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from data_pipeline.stages.detect.text_guided import TextGuidedDetector


class LookSettings(Settings):
    """At what size pictures are looked at."""

    batch_size: int = Field(8, ge=1)  # pictures at once; only those of one size (below) really go together
    shortest_side: int = Field(800, ge=32)  # pixels; published: 800, and 1333 for the longer side
    longest_side: int = Field(1333, ge=32)  # pixels; where the longer side would be longer, the picture is smaller
    side_multiple: int = Field(32, ge=1)  # sides are rounded to it, so that pictures meet in a batch; 1: as published

    @model_validator(mode="after")
    def _sides_fit(self) -> LookSettings:
        if self.longest_side < self.shortest_side:
            raise ValueError(f"longest_side={self.longest_side} is below shortest_side={self.shortest_side}")
        return self


class GroundingDinoSettings(LookSettings):
    """Settings of the backend."""

    backend: Literal["grounding_dino"] = "grounding_dino"
    model: str = "IDEA-Research/grounding-dino-tiny"  # hub id or folder; MM Grounding DINO too
    revision: str | None = None  # commit, tag or branch of a hub id
    dtype: DtypeName = "float32"  # float16 is faster; its boxes move by some pixels, those of bfloat16 by more

    def load(self, device: str) -> TextGuidedDetector:
        """The detector on that device.

        Raises:
            UserError: it cannot be had, or is of another kind.
        """
        from transformers import AutoImageProcessor, AutoModelForZeroShotObjectDetection, AutoTokenizer

        from data_pipeline.stages.detect.text_guided import Sides, TextGuidedDetector

        found = find_pretrained("detect.model", self.model, self.revision)
        dtype = resolve_dtype(self.dtype, device)
        tokenizer, looks = found.processor(AutoTokenizer), found.processor(AutoImageProcessor)
        kinds = ("grounding-dino", "mm-grounding-dino")
        model: Any = found.network(AutoModelForZeroShotObjectDetection, kinds, device, dtype)
        # each phrase sees itself alone by a mask of truth values, which "eager" would add to the logits as 0 and 1
        model.model.text_backbone.set_attn_implementation("sdpa")

        def network(pixels: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
            tokens = tokenizer(texts, padding=True, return_tensors="pt").to(device)
            output = model(pixel_values=pixels, **tokens)
            return output.logits, output.pred_boxes

        return TextGuidedDetector(
            network,
            tokenizer,
            Sides(self.shortest_side, self.longest_side, self.side_multiple, model.config.num_queries),
            found.provenance(self.backend),
            device,
            dtype,
            max_tokens=model.config.max_text_len,
            mean=looks.image_mean,
            deviation=looks.image_std,
        )
