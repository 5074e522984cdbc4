"""Hooking fusers and location convolution into a stock UNet without registering them there.

The UNet's parameters, state dict, attention processors and saved folder stay those of the plain model: everything that
is added hangs in instance dictionaries and hooks. diffusers' transformer block calls `self.fuser(x, objs)` whenever
`cross_attention_kwargs["gligen"]` is passed (GLIGEN's path), and that is the only thing relied on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from model.subject_adapter.condition import SubjectCondition

ATTRIBUTE = "subject_attachment"


def transformer_blocks(unet: UNet2DConditionModel) -> dict[str, BasicTransformerBlock]:
    """Every transformer block by its path in the UNet, e.g. `down_blocks.0.attentions.0.transformer_blocks.0`."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, BasicTransformerBlock)}


def pass_through(objs: SubjectCondition) -> SubjectCondition:
    """Stands for GLIGEN's position net: the condition arrives finished."""
    return objs


def no_fuser(hidden_states: Tensor, condition: SubjectCondition) -> Tensor:
    """Stands in blocks that carry no fuser."""
    return hidden_states


class Attachment:
    """One adapter hooked into one UNet."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        fusers: Mapping[str, nn.Module],
        location_convolution: nn.Module | None,
    ) -> None:
        """Args:
            unet: plain UNet.
            fusers: by path of the block they stand in.
            location_convolution: (B, 1, h, w) -> (B, C, h, w), added to the output of `conv_in`.
        Raises:
            ValueError: the UNet brings fusers of its own, or lacks a block.
        """
        blocks = transformer_blocks(unet)
        missing = sorted(set(fusers) - set(blocks))
        if missing:
            raise ValueError(f"subject adapter: made for another architecture; this UNet has no block {missing[0]}")
        if hasattr(type(unet), "position_net") or "position_net" in unet._modules:
            raise ValueError("subject adapter: this UNet has grounding of its own (gated attention); give a plain one")
        self.location: Tensor | None = None  # of the forward pass that is running
        self.location_convolution = location_convolution
        for name, block in blocks.items():
            block.__dict__["fuser"] = fusers.get(name, no_fuser)
        unet.__dict__["position_net"] = pass_through
        self.handles = [
            unet.register_forward_pre_hook(self._before_unet, with_kwargs=True),
            unet.conv_in.register_forward_hook(self._after_conv_in),
        ]
        unet.__dict__[ATTRIBUTE] = self

    def remove(self, unet: UNet2DConditionModel) -> None:
        for block in transformer_blocks(unet).values():
            del block.__dict__["fuser"]
        for handle in self.handles:
            handle.remove()
        del unet.__dict__["position_net"], unet.__dict__[ATTRIBUTE]

    def _before_unet(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        grounding = (kwargs.get("cross_attention_kwargs") or {}).get("gligen")
        self.location = None if grounding is None else grounding["objs"].location
        if self.location is not None:
            sample = args[0] if args else kwargs["sample"]
            expected = (sample.shape[0], 1, *sample.shape[2:])
            if self.location.shape != expected:
                raise ValueError(
                    f"subject condition: location mask {tuple(self.location.shape)}, the latents need {expected}"
                )

    def _after_conv_in(self, conv_in: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if self.location is None or self.location_convolution is None:
            return output
        location, self.location = self.location, None
        return output + self.location_convolution(location.to(output.dtype))  # (B, C, h, w)


def detach(unet: UNet2DConditionModel) -> None:
    """Make the UNet plain again; nothing happens to one that is."""
    attachment = unet.__dict__.get(ATTRIBUTE)
    if attachment is not None:
        attachment.remove(unet)
