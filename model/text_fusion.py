"""The text encoder with subjects' concepts and learned words put in place of their tokens.

Prompt and tokens come from `prompt.py`, concepts from the subject adapter; the result is the UNet's cross-attention
context. "before": the concept replaces the token embedding ahead of the position embeddings (Subject-Diffusion,
arXiv 2307.11410). "after": it replaces the encoder's last hidden state, f_c <- alpha f_c with alpha = 0.4
(InstantBooth, arXiv 2304.03411, "concept token renormalization").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import CLIPTextModel
from transformers.masking_utils import create_causal_mask

Fusion = Literal["before", "after"]


@dataclass(frozen=True)
class WordRows:
    """Vectors of learned words (`learned_words.py`), and the token ids that they stand for."""

    ids: Tensor  # (N,) int64, above the vocabulary
    rows: Tensor  # (N, D), or (B, N, D) where they differ by prompt


@dataclass(frozen=True)
class PromptEmbeddings:
    """Prompts as the text encoder takes them."""

    tokens: Tensor  # (B, L, D) token embeddings, without positions
    states: tuple[Tensor, Tensor] | None = None  # fusion "after": where (B, L, 1) and what (B, L, D) replaces states

    def rows(self, chosen: Tensor) -> PromptEmbeddings:
        """Some of the prompts, by index."""
        return PromptEmbeddings(
            self.tokens[chosen], None if self.states is None else (self.states[0][chosen], self.states[1][chosen])
        )


def encode_prompt(
    text_encoder: CLIPTextModel,
    input_ids: Tensor,
    concepts: Tensor | None,
    placeholder_positions: Tensor,
    fusion: Fusion = "before",
    scale: float = 1.0,
    words: WordRows | None = None,
) -> Tensor:
    """Encode B prompts with up to S subjects and learned words.

    Args:
        text_encoder: stock CLIP text model of width D.
        input_ids: (B, L) int64; ids at placeholder positions are ignored and may lie outside the vocabulary.
        concepts: (B, S, D) one vector a subject, or None: plain prompts, which may hold no placeholder.
        placeholder_positions: (B, S) int64 index into L, -1 where there is no subject.
        fusion: where the concept enters, "before" or "after" the encoder.
        scale: factor on the concept (InstantBooth: 0.4 with "after").
        words: vectors that go in place of their ids; gradients reach them.
    Returns:
        (B, L, D) last hidden states after the final layer norm; without concepts equal to the stock
        `text_encoder(input_ids).last_hidden_state`.
    """
    embedded = embed_prompt(text_encoder, input_ids, concepts, placeholder_positions, fusion, scale, words)
    return encode_embeddings(text_encoder, embedded)  # (B, L, D)


def embed_prompt(
    text_encoder: CLIPTextModel,
    input_ids: Tensor,
    concepts: Tensor | None,
    placeholder_positions: Tensor,
    fusion: Fusion = "before",
    scale: float = 1.0,
    words: WordRows | None = None,
) -> PromptEmbeddings:
    """First half of `encode_prompt`, same arguments: token embeddings with concepts and words in their places."""
    token_embedding = text_encoder.embeddings.token_embedding
    learned = None if words is None else input_ids[:, :, None] == words.ids  # (B, L, N)
    if concepts is None or concepts.shape[1] == 0:
        if words is None or learned is None:
            return PromptEmbeddings(token_embedding(input_ids))  # (B, L, D)
        known = input_ids.masked_fill(learned.any(dim=2), 0)  # (B, L)
        return PromptEmbeddings(_place_words(token_embedding(known), learned, words.rows))
    if fusion not in ("before", "after"):
        raise ValueError(f"fusion {fusion!r}: expected 'before' or 'after'")
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)  # (L,)
    placed = placeholder_positions[:, :, None] == positions  # (B, S, L)
    is_concept = placed.any(dim=1)  # (B, L)
    subject = placed.int().argmax(dim=1)  # (B, L) which subject stands at a position, 0 where none
    # The placeholder has no row in the embedding matrix, so another id is looked up in its place. With "after" the
    # encoder reads it: the end token, because it says nothing of its own, and the noun before it names the thing. It is
    # the highest id of a CLIP vocabulary; the config's `eos_token_id` is wrong (2) in SD 1.x.
    unknown = is_concept if learned is None else is_concept | learned.any(dim=2)  # (B, L)
    known = input_ids.masked_fill(unknown, 0)  # (B, L)
    stand_in = known.amax(dim=1, keepdim=True)  # (B, 1)
    embeddings = token_embedding(torch.where(unknown, stand_in, known))  # (B, L, D)
    if words is not None and learned is not None:
        embeddings = _place_words(embeddings, learned, words.rows)
    at_position = subject[:, :, None].expand(-1, -1, concepts.shape[2])  # (B, L, D)
    values = scale * concepts.gather(1, at_position)  # (B, L, D)
    if fusion == "before":
        return PromptEmbeddings(torch.where(is_concept[:, :, None], values.to(embeddings.dtype), embeddings))
    return PromptEmbeddings(embeddings, (is_concept[:, :, None], values))


def encode_embeddings(text_encoder: CLIPTextModel, embedded: PromptEmbeddings) -> Tensor:
    """Second half of `encode_prompt`: the stock forward from token embeddings on; the stock class takes ids only."""
    hidden = text_encoder.embeddings(inputs_embeds=embedded.tokens)  # (B, L, D)
    # The mask is always built: `is_causal` alone is ignored by the eager attention.
    mask = create_causal_mask(
        config=text_encoder.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
    )
    encoded = text_encoder.encoder(inputs_embeds=hidden, attention_mask=mask, is_causal=True)
    states = text_encoder.final_layer_norm(encoded.last_hidden_state)  # (B, L, D)
    if embedded.states is None:
        return states
    where, values = embedded.states
    return torch.where(where, values.to(states.dtype), states)  # (B, L, D)


def _place_words(embeddings: Tensor, learned: Tensor, rows: Tensor) -> Tensor:
    """Put rows (N, D) or (B, N, D) where `learned` (B, L, N) says."""
    column = learned.int().argmax(dim=2)  # (B, L)
    rows = rows.to(embeddings.dtype)
    if rows.dim() == 2:
        values = rows[column]  # (B, L, D)
    else:
        values = rows.gather(1, column[:, :, None].expand(-1, -1, rows.shape[2]))
    return torch.where(learned.any(dim=2)[:, :, None], values, embeddings)  # (B, L, D)
