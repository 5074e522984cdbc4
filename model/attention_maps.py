"""Cross-attention maps of the supervised tokens, read out of fused attention.

`install_recording(unet)` once, then pass an `AttentionMapRecorder` through the UNet as
`cross_attention_kwargs={"recorder": recorder}`; `losses.attention_map_loss` takes its maps. Which layers: the middle
five of SD's seven block groups (Subject-Diffusion, arXiv 2307.11410).
Attention output is P V. With V extended by columns w, one a subject, the extra output columns are P w: probabilities
averaged over that subject's tokens, exact and with gradients; in half precision without ever holding P.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers.models import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor


class AttentionMapRecorder:
    """Holds what one UNet pass attends to.

    Layers write by name and never append, because activation checkpointing runs them twice.
    """

    def __init__(self, weights: Tensor) -> None:
        """Args:
        weights: (B, S, L) averaging weights over text tokens, from `prompt.supervised_weights`.
        """
        self.weights = weights
        self.maps: dict[str, Tensor] = {}  # layer name -> (B, heads, S, query tokens), values 0..1


LayerContext = Callable[[int, Tensor], Tensor]  # layer, (B, T, C) what enters it -> (B, L, D), `layer_contexts.py`


class RecordingAttnProcessor(AttnProcessor2_0):
    """Stock attention that also writes maps when a recorder comes along, and takes its context from `layer_contexts`.

    Without a layer name it only accepts the recorder and ignores it, without an index likewise the contexts: diffusers
    warns at every call of every layer whose processor does not name an argument.
    """

    def __init__(self, layer: str | None = None, index: int | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.index = index  # among the cross-attention layers, in the order the UNet runs them

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        recorder: AttentionMapRecorder | None = None,
        layer_contexts: LayerContext | None = None,
    ) -> Tensor:
        if layer_contexts is not None and self.index is not None:
            encoder_hidden_states = layer_contexts(self.index, hidden_states)  # (B, L, D)
        if recorder is None or self.layer is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        assert encoder_hidden_states is not None, "only cross-attention layers are given a name"
        rows, length, _ = encoder_hidden_states.shape
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, length, rows)
            attention_mask = attention_mask.view(rows, attn.heads, -1, length)

        def split_heads(projected: Tensor) -> Tensor:
            return projected.view(rows, -1, attn.heads, projected.shape[-1] // attn.heads).transpose(1, 2)

        query = split_heads(attn.to_q(hidden_states))  # (B, heads, Q, d)
        key = split_heads(attn.to_k(encoder_hidden_states))  # (B, heads, L, d)
        value = split_heads(attn.to_v(encoder_hidden_states))  # (B, heads, L, d)
        output, maps = attend_and_record(query, key, value, recorder.weights, attention_mask)
        recorder.maps[self.layer] = maps
        output = output.transpose(1, 2).flatten(2)  # (B, Q, heads * d)
        return attn.to_out[1](attn.to_out[0](output)) / attn.rescale_output_factor  # (B, Q, D)


def attend_and_record(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, and its probabilities averaged over chosen keys.

    Args:
        query: (B, heads, Q, d).
        key, value: (B, heads, L, d).
        weights: (B, S, L) averaging weights.
        attention_mask: broadcastable to (B, heads, Q, L), boolean or added to the logits.
    Returns:
        output (B, heads, Q, d) and maps (B, heads, S, Q), in the dtype of `value`.
    """
    head_width = value.shape[-1]
    columns = weights.to(value).transpose(1, 2)[:, None].expand(-1, value.shape[1], -1, -1)  # (B, heads, L, S)
    value = torch.cat([value, columns], dim=-1)  # (B, heads, L, d + S)
    attend = _attend_in_products if query.dtype == torch.float32 else _attend_fused
    extended = attend(query, key, value, attention_mask)  # (B, heads, Q, d + S)
    output, maps = extended.split([head_width, weights.shape[1]], dim=-1)
    return output, maps.transpose(2, 3)


def _attend_in_products(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
    """softmax(Q K) V written out, for float32: on a prompt's 77 tokens the fused kernels save nothing there.

    The probabilities take no more memory than query and output at the fused kernels' width, and a CPU needs less time.
    """
    logits = query @ (key * query.shape[-1] ** -0.5).mT  # (B, heads, Q, L)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention_mask, float("-inf"))
    elif attention_mask is not None:
        logits = logits + attention_mask
    return logits.softmax(dim=-1) @ value


def _attend_fused(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None) -> Tensor:
    # The fused kernels want equal widths of query, key and value, in multiples of 8. Zeros add nothing to the logits,
    # but would change the default scale.
    head_width, width = query.shape[-1], value.shape[-1]
    padded = width + -width % 8
    query, key = (F.pad(states, (0, padded - head_width)) for states in (query, key))
    value = F.pad(value, (0, padded - width))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=head_width**-0.5)
    return output[..., :width]


def supervised_layers(unet: UNet2DConditionModel) -> list[str]:
    """Names of the cross-attention layers whose maps are trained, in the order the UNet runs them.

    Block groups (each down block, the middle, each up block) without cross-attention are not counted; of the others all
    but the first and the last. At SD size: down_blocks.1, down_blocks.2, mid_block, up_blocks.1, up_blocks.2.

    Raises:
        ValueError: the UNet has fewer than three groups with cross-attention.
    """
    layers = _layers_by_group(unet)
    if len(layers) < 3:
        raise ValueError(f"attention maps: {len(layers)} block groups hold cross-attention, at least 3 are needed")
    return [name for group in layers[1:-1] for name in group]


def cross_attention_layers(unet: UNet2DConditionModel) -> list[str]:
    """Names of all cross-attention layers in the order the UNet runs them: down, middle, up; 16 at SD size."""
    return [name for group in _layers_by_group(unet) for name in group]


def install_layer_contexts(unet: UNet2DConditionModel) -> None:
    """Let the UNet accept `layer_contexts`; does nothing where `install_recording` did so before, which keeps its maps.

    Raises:
        ValueError: a layer whose processor is not the stock one and would be lost.
    """
    layers = (unet.get_submodule(name) for name in cross_attention_layers(unet))
    if not all(type(layer.processor) is RecordingAttnProcessor for layer in layers):
        install_recording(unet, layers=())


def install_recording(unet: UNet2DConditionModel, layers: Sequence[str] | None = None) -> None:
    """Let the UNet accept a recorder and layer contexts; its output stays that of stock attention.

    Install after anything that brings its own attention processors (IP-Adapter).

    Args:
        unet: a stock UNet, with or without subject adapter; changed in place.
        layers: names of the attn2 layers that write maps; None takes `supervised_layers(unet)`.
    Raises:
        ValueError: an unknown layer, or one whose processor is not the stock one and would be lost.
    """
    recorded = supervised_layers(unet) if layers is None else list(layers)
    unknown = sorted(set(recorded) - set(_attention_names(unet, ".attn2")))
    if unknown:
        raise ValueError(f"attention maps: {unknown[0]} is no cross-attention layer of this UNet")
    indices = {name: index for index, name in enumerate(cross_attention_layers(unet))}
    for name in [*_attention_names(unet, ".attn1"), *_attention_names(unet, ".attn2")]:
        attention = unet.get_submodule(name)
        assert isinstance(attention, Attention)
        if type(attention.processor) not in (AttnProcessor2_0, RecordingAttnProcessor):
            kind = type(attention.processor).__name__
            raise ValueError(f"attention maps: {name} has a {kind}; recording replaces stock processors only")
        attention.set_processor(RecordingAttnProcessor(name if name in recorded else None, indices.get(name)))


def _layers_by_group(unet: UNet2DConditionModel) -> list[list[str]]:
    """Cross-attention layers of each block group that has any, in the order of execution."""
    groups = [f"down_blocks.{index}" for index in range(len(unet.down_blocks))]
    groups += ["mid_block"] + [f"up_blocks.{index}" for index in range(len(unet.up_blocks))]
    names = _attention_names(unet, ".attn2")
    layers = [[name for name in names if name.startswith(f"{group}.")] for group in groups]
    return [group for group in layers if group]


def _attention_names(unet: UNet2DConditionModel, ending: str) -> list[str]:
    return [name for name, module in unet.named_modules() if isinstance(module, Attention) and name.endswith(ending)]
