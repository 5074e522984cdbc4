"""The text encoder with the subjects' concepts put in place of the placeholder.

Prompt and tokens come from `prompt.py`, concepts from the subject adapter; the result is the UNet's cross-attention
context. "before": the concept replaces the token embedding ahead of the position embeddings (Subject-Diffusion,
arXiv 2307.11410). "after": it replaces the encoder's last hidden state, f_c <- alpha f_c with alpha = 0.4
(InstantBooth, arXiv 2304.03411, "concept token renormalization").
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from transformers import CLIPTextModel
from transformers.masking_utils import create_causal_mask

Fusion = Literal["before", "after"]


def encode_prompt(
    text_encoder: CLIPTextModel,
    input_ids: Tensor,
    concepts: Tensor | None,
    placeholder_positions: Tensor,
    fusion: Fusion = "before",
    scale: float = 1.0,
) -> Tensor:
    """Encode B prompts with up to S subjects.

    Args:
        text_encoder: stock CLIP text model of width D.
        input_ids: (B, L) int64; ids at placeholder positions are ignored and may lie outside the vocabulary.
        concepts: (B, S, D) one vector a subject, or None: plain prompts, which may hold no placeholder.
        placeholder_positions: (B, S) int64 index into L, -1 where there is no subject.
        fusion: where the concept enters, "before" or "after" the encoder.
        scale: factor on the concept (InstantBooth: 0.4 with "after").
    Returns:
        (B, L, D) last hidden states after the final layer norm; without concepts equal to the stock
        `text_encoder(input_ids).last_hidden_state`.
    """
    if concepts is None or concepts.shape[1] == 0:
        return _run_encoder(text_encoder, text_encoder.embeddings.token_embedding(input_ids))  # (B, L, D)
    if fusion not in ("before", "after"):
        raise ValueError(f"fusion {fusion!r}: expected 'before' or 'after'")
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (L,)
    placed = placeholder_positions[:, :, None] == positions  # (B, S, L)
    is_concept = placed.any(dim=1)  # (B, L)
    subject = placed.int().argmax(dim=1)  # (B, L) which subject stands at a position, 0 where none
    # The placeholder has no row in the embedding matrix, so another id is looked up in its place. With "after" the
    # encoder reads it: the end token, because it says nothing of its own, and the noun before it names the thing. It is
    # the highest id of a CLIP vocabulary; the config's `eos_token_id` is wrong (2) in SD 1.x.
    known = input_ids.masked_fill(is_concept, 0)  # (B, L)
    stand_in = known.amax(dim=1, keepdim=True)  # (B, 1)
    embeddings = text_encoder.embeddings.token_embedding(torch.where(is_concept, stand_in, known))  # (B, L, D)
    at_position = subject[:, :, None].expand(-1, -1, concepts.shape[2])  # (B, L, D)
    values = scale * concepts.gather(1, at_position)  # (B, L, D)
    if fusion == "before":
        embeddings = torch.where(is_concept[:, :, None], values.to(embeddings.dtype), embeddings)  # (B, L, D)
        return _run_encoder(text_encoder, embeddings)  # (B, L, D)
    states = _run_encoder(text_encoder, embeddings)  # (B, L, D)
    return torch.where(is_concept[:, :, None], values.to(states.dtype), states)  # (B, L, D)


def _run_encoder(text_encoder: CLIPTextModel, token_embeddings: Tensor) -> Tensor:
    """The stock forward from token embeddings (B, L, D) on; the stock class takes ids only."""
    hidden = text_encoder.embeddings(inputs_embeds=token_embeddings)  # (B, L, D)
    # The mask is always built: `is_causal` alone is ignored by the eager attention.
    mask = create_causal_mask(
        config=text_encoder.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
    )
    encoded = text_encoder.encoder(inputs_embeds=hidden, attention_mask=mask, is_causal=True)
    return text_encoder.final_layer_norm(encoded.last_hidden_state)  # (B, L, D)
