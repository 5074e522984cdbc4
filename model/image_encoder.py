"""The frozen image encoder of references: open_clip's vision tower in diffusers' saved form.

Returns what the subject adapter takes: the pooled vector (for the concept) and the patch tokens (for the subject
tokens), as `output_tokens=True` gives them. The normalisation constants are part of the model.
"""

from __future__ import annotations

from typing import Any

import open_clip
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

CLIP_MEAN, CLIP_STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


class SubjectImageEncoder(ModelMixin, ConfigMixin):
    """Pictures -> pooled vector and patch tokens."""

    config_name = "config.json"

    @register_to_config
    def __init__(
        self,
        embed_dim: int,
        vision_cfg: dict[str, Any],
        quick_gelu: bool = False,
        mean: tuple[float, float, float] = CLIP_MEAN,
        std: tuple[float, float, float] = CLIP_STD,
    ) -> None:
        super().__init__()
        from open_clip.model import _build_vision_tower

        self.visual = _build_vision_tower(embed_dim, vision_cfg, quick_gelu)
        self.visual.output_tokens = True
        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).reshape(3, 1, 1), persistent=False)

    @classmethod
    def from_open_clip(
        cls,
        clip: open_clip.CLIP,
        config: dict[str, Any],
        mean: tuple[float, float, float] = CLIP_MEAN,
        std: tuple[float, float, float] = CLIP_STD,
    ) -> SubjectImageEncoder:
        """The image tower of an open_clip model; `config` is its `model_cfg`."""
        encoder = cls(
            config["embed_dim"], config["vision_cfg"], bool(config.get("quick_gelu")), tuple(mean), tuple(std)
        )
        encoder.visual.load_state_dict(clip.visual.state_dict())
        return encoder

    @property
    def image_size(self) -> int:
        """Side of the pictures it takes, pixels."""
        return int(self.config.vision_cfg["image_size"])

    @property
    def pooled_dim(self) -> int:
        return int(self.config.embed_dim)

    @property
    def patch_dim(self) -> int:
        return int(self.config.vision_cfg["width"])

    @property
    def num_patches(self) -> int:
        return (self.image_size // int(self.config.vision_cfg["patch_size"])) ** 2

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) in 0..1 -> pooled (N, P), patch tokens (N, T, W)."""
        normalised = (pictures.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        return self.visual(normalised)
