"""The CLIP text encoder over part of a prompt, from the keys and values of what stands before it.

Attention is causal, so what stands before a learned word does not change with it: `layer_contexts.py` encodes that part
once and only the rest for each cross-attention layer. Equal to the stock forward over the whole prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextModel
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

KeysValues = tuple[Tensor, Tensor]  # (B, heads, P, d) each


@dataclass(frozen=True)
class Past:
    """What the encoder's layers hold of the first P positions of B prompts."""

    keys_values: tuple[KeysValues, ...]  # one an encoder layer

    @property
    def length(self) -> int:
        return self.keys_values[0][0].shape[2]

    def repeat_rows(self, times: int) -> Past:
        """Rows [r0..rB, r0..rB, …]."""
        return Past(tuple((k.repeat(times, 1, 1, 1), v.repeat(times, 1, 1, 1)) for k, v in self.keys_values))


def encode_onward(text_encoder: CLIPTextModel, hidden: Tensor, past: Past | None = None) -> tuple[Tensor, Past]:
    """Encode Q positions that follow P positions encoded before.

    Args:
        text_encoder: stock CLIP text model.
        hidden: (B, Q, D) token and position embeddings of positions P … P + Q - 1.
        past: of the first P positions of the same B rows; None where P is 0.
    Returns:
        (B, Q, D) states after the final layer norm, and what later positions need of these Q.
    """
    start, count = past.length if past else 0, hidden.shape[1]
    # Added to the logits: a boolean mask would be turned into this one anew in every layer.
    mask = hidden.new_full((count, start + count), float("-inf")).triu(start + 1)  # (Q, P + Q)
    held: list[KeysValues] = []
    for index, layer in enumerate(text_encoder.encoder.layers):
        hidden, fresh = _run_layer(layer, hidden, past.keys_values[index] if past else None, mask)
        held.append(fresh)
    return text_encoder.final_layer_norm(hidden), Past(tuple(held))


def _run_layer(
    layer: CLIPEncoderLayer, hidden: Tensor, past: KeysValues | None, mask: Tensor
) -> tuple[Tensor, KeysValues]:
    """One encoder layer: (B, Q, D) -> (B, Q, D), and the keys and values (B, heads, Q, d) of these positions."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden)  # (B, Q, D)

    def split(projected: Tensor) -> Tensor:
        return projected.view(*projected.shape[:2], attention.num_heads, -1).transpose(1, 2)  # (B, heads, Q, d)

    fresh = split(attention.k_proj(normed)), split(attention.v_proj(normed))
    keys, values = fresh if past is None else (torch.cat(pair, dim=2) for pair in zip(past, fresh, strict=True))
    query = split(attention.q_proj(normed))
    attended = functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=attention.scale)
    hidden = hidden + attention.out_proj(attended.transpose(1, 2).flatten(2))
    return hidden + layer.mlp(layer.layer_norm2(hidden)), fresh
