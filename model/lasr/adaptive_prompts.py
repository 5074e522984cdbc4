"""Prompts with adaptive words, encoded inside the UNet pass from what a cross-attention layer sees.

`exact` encodes for one layer, as the pass reaches it. `fast` encodes for all layers in one call, from features of the
previous denoising step, and only up to the end of the text: the padding behind it is taken to move as the end token
does. Held by `layer_contexts.py`, which mixes the states with the static ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from transformers import CLIPTextModel

from model.causal_text import Past, encode_onward
from model.lasr.adaptive_embedding import AdaptiveRows
from model.lasr.pooling import token_weights
from model.learned_words import LearnedWord, LearnedWords


@dataclass(frozen=True)
class AdaptivePrompts:
    """A prompts that are encoded from position P on, where their first layerwise word stands; Q = L - P."""

    text_encoder: CLIPTextModel
    words: list[tuple[int, LearnedWord]]  # adaptive ones, with the place of their first row in `rows`
    makers: list[AdaptiveRows]  # of the same words
    layers: Sequence[Attention]  # cross-attention layers of the UNet, in the order of execution
    rows: Tensor  # (layers, N, D) static rows of all words
    hidden: Tensor  # (layers, A, Q, D) token and position embeddings with static rows
    past: Past  # of positions 0 … P - 1, A rows
    past_by_layer: Past  # the same for layers · A rows
    places: tuple[Tensor, Tensor, Tensor]  # of each replaced token: row in A, position in Q, which adaptive vector
    positions: Tensor  # (tokens, D) position embeddings of the replaced tokens
    weight: Tensor  # (A, 1, 1) w of the mix
    num_used: int  # positions of Q up to the last end token of a text
    valid: Tensor | None  # (A, 1, h, w) region that features are pooled over

    @property
    def start(self) -> int:
        """P."""
        return self.past.length

    def pool(self, layer: int, features: Tensor) -> list[Tensor]:
        """What enters a layer, (A, T, C) -> one feature (A, F) a word."""
        weights = None if self.valid is None else token_weights(self.valid, features.shape[1])
        pooled = []
        for first, word in self.words:
            assert word.adaptive is not None
            own = self.rows[layer, first : first + word.num_vectors]  # (K, D)
            with in_float32(features.device):
                pooled.append(word.adaptive.pool(layer, features, weights, own, self.layers[layer]))
        return pooled

    def of_time(self, time: Tensor) -> list[Tensor]:
        """What the time of a pass, (A, width), says to all layers: (layers, A, …) a word."""
        with in_float32(time.device):
            return [maker.of_time(time) for maker in self.makers]

    def encode(self, layer: int, pooled: list[Tensor], told: list[Tensor]) -> Tensor:
        """Exact states of one layer, from `pool` and `of_time`: (A, Q, D)."""
        return encode_onward(self.text_encoder, self._place(layer, pooled, told), self.past)[0]

    def encode_all(self, pooled: dict[int, list[Tensor]], told: list[Tensor], static: Tensor) -> Tensor:
        """States of all layers in one call.

        Args:
            pooled: features by layer.
            told: from `of_time`.
            static: (layers, A, Q, D) static states.
        Returns:
            (layers, A, Q, D).
        """
        used = self.num_used
        placed = torch.stack([self._place(layer, pooled[layer], told)[:, :used] for layer in range(len(static))])
        states, _ = encode_onward(self.text_encoder, placed.flatten(0, 1), self.past_by_layer)
        states = states.unflatten(0, placed.shape[:2])  # (layers, A, used, D)
        padding = static[:, :, used:] + (states[:, :, -1:] - static[:, :, used - 1 : used])
        return torch.cat([states, padding], dim=2)

    def _place(self, layer: int, pooled: list[Tensor], told: list[Tensor]) -> Tensor:
        """Input of the text encoder with this layer's adaptive rows in it: (A, Q, D)."""
        with in_float32(self.hidden.device):
            found = [
                make(layer, feature, time) * word.scale  # (A, K, D)
                for (_, word), make, feature, time in zip(self.words, self.makers, pooled, told, strict=True)
            ]
        row, position, vector = self.places
        values = torch.cat(found, dim=1)[row, vector].to(self.hidden.dtype) + self.positions  # (tokens, D)
        return self.hidden[layer].index_put((row, position), values)


def in_float32(device: torch.device) -> AbstractContextManager[None]:
    """Without autocast; nothing at all where none is on, because it is asked for in every layer."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def adaptive_places(words: LearnedWords, input_ids: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None:
    """Where adaptive words stand in prompts, and how much they count.

    Args:
        input_ids: (A, L).
    Returns:
        Row, position and adaptive vector of each such token; and w of each prompt (A,), the mean over its adaptive
        words, 0 where it has none. None where no prompt has any.
    """
    adaptive = [word for _, word in words.adaptive_words()]
    ids = torch.tensor([index for word in adaptive for index in word.ids], dtype=torch.int64, device=input_ids.device)
    row, position, vector = (input_ids[:, :, None] == ids).nonzero(as_tuple=True)
    if len(row) == 0:
        return None
    firsts = torch.tensor([word.ids[0] for word in adaptive], device=input_ids.device)
    present = (input_ids[:, :, None] == firsts).any(dim=1).float()  # (A, words)
    weights = torch.tensor([word.adaptive_weight for word in adaptive], device=input_ids.device)
    return (row, position, vector), present @ weights / present.sum(dim=1).clamp(min=1)


def last_end(input_ids: Tensor, vocabulary: int) -> int:
    """Position of the last end token of a text among prompts (A, L); it is the highest id of a CLIP vocabulary."""
    end = input_ids.masked_fill(input_ids >= vocabulary, 0).amax(dim=1, keepdim=True)
    return int((input_ids == end).int().argmax(dim=1).max())
