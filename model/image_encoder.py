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
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import Tensor

HUB_TIMEOUT_S = 10
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
        # By keyword: arguments given by position are not written into what `from_config` reads.
        encoder = cls(
            embed_dim=config["embed_dim"],
            vision_cfg=config["vision_cfg"],
            quick_gelu=bool(config.get("quick_gelu")),
            mean=tuple(mean),
            std=tuple(std),
        )
        encoder.visual.load_state_dict(clip.visual.state_dict())
        return encoder

    @classmethod
    def from_pretrained_open_clip(cls, name: str, pretrained: str) -> SubjectImageEncoder:
        """The image tower of a published CLIP, from open_clip's cache or the hub.

        Args:
            name: of the architecture in open_clip, e.g. ViT-H-14.
            pretrained: tag of its weights, e.g. laion2b_s32b_b79k.
        Raises:
            ValueError: open_clip knows no such architecture or tag.
            Exception: what the hub's client and its transport raise when the weights cannot be had.
        """
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags:
            known = ", ".join(tags) or f"no weights; a known name is {open_clip.list_pretrained()[0][0]}"
            raise ValueError(f"open_clip has no weights {pretrained} of {name}; it has {known}")
        _ask_hub(open_clip.get_pretrained_cfg(name, pretrained).get("hf_hub", ""))
        clip = open_clip.create_model(name, pretrained=pretrained)
        pixels = clip.visual.preprocess_cfg
        return cls.from_open_clip(clip, open_clip.get_model_config(name), pixels["mean"], pixels["std"])

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


def _ask_hub(place: str) -> None:
    """Fail now where open_clip's own download would try for a minute: weights neither in the cache nor to be had."""
    hub_id = place.rsplit("/", 1)[0]
    if hub_id:
        try:
            snapshot_download(hub_id, local_files_only=True)
        except LocalEntryNotFoundError:
            HfApi().model_info(hub_id, timeout=HUB_TIMEOUT_S)
