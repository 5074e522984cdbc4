"""The adapter layer between self- and cross-attention: image tokens look at themselves and at the subject tokens.

    x <- x + beta tanh(a1) SA(LN[x; W o])[:|x|]        x <- x + beta tanh(a2) FF(LN x)
(GLIGEN, arXiv 2301.07093, equation 8; Subject-Diffusion, arXiv 2307.11410, equation 3). Only image tokens ask: rows of
the subject tokens would be thrown away. Subject keys and values depend on neither image nor timestep.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import FeedForward
from torch import Tensor, nn
from torch.nn import functional

from model.subject_adapter.condition import SubjectCondition
from model.subject_adapter.grounding import BOX_FEATURES, fourier_box_features
from model.subject_adapter.location import grid_of_tokens, rasterise_boxes
from model.subject_adapter.places import cell_boxes


class _Projections(nn.Module):
    """Parameters of diffusers' `Attention` under its names, without its processor machinery.

    A module with `set_processor` here would be taken for a cross-attention by the IP-Adapter and LoRA loaders.
    """

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_k = nn.Linear(width, inner, bias=False)
        self.to_v = nn.Linear(width, inner, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(inner, width)])

    def split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, head_dim)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        split = self.split
        out = functional.scaled_dot_product_attention(split(queries), split(keys), split(values), attn_mask=mask)
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # (B, T, C)


class SubjectFuser(nn.Module):
    """One adapter layer; its state dict is that of diffusers' `GatedSelfAttentionDense`.

    With `places`, queries and subject keys also carry where they are in the picture (`places.py`): `place.weight`.
    """

    def __init__(
        self, name: str, query_dim: int, context_dim: int, heads: int, head_dim: int, places: bool = False
    ) -> None:
        super().__init__()
        self.name = name
        self.linear = nn.Linear(context_dim, query_dim)
        self.attn = _Projections(query_dim, heads, head_dim)
        self.ff = FeedForward(query_dim, activation_fn="geglu")
        self.norm1 = nn.LayerNorm(query_dim)
        self.norm2 = nn.LayerNorm(query_dim)
        self.place = nn.Linear(BOX_FEATURES, heads * head_dim, bias=False) if places else None
        if self.place is not None:
            # Wide enough that an untrained fuser already looks at the patches that lie nearest.
            nn.init.normal_(self.place.weight, std=0.15)
        # Shape (1,) and not (): DeepSpeed cannot start with 0-dim parameters. Files keep the published shape.
        self.alpha_attn = nn.Parameter(torch.zeros(1))
        self.alpha_dense = nn.Parameter(torch.zeros(1))
        self.register_state_dict_post_hook(_gates_as_scalars)
        self.register_load_state_dict_pre_hook(_gates_as_vectors)

    @torch.no_grad()
    def start_with_zero_outputs(self) -> None:
        """Open the gates and set the last layers to 0 instead: the untrained fuser still changes nothing."""
        for gate, last in ((self.alpha_attn, self.attn.to_out[0]), (self.alpha_dense, self.ff.net[2])):
            gate.fill_(1.0)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def keys_values(self, tokens: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of subject tokens (B, N, D) with their places (B, N, 64): each (B, N, inner)."""
        projected = self.norm1(self.linear(tokens))  # (B, N, C); LayerNorm is per token, so this equals LN[x; W o]
        keys = self.attn.to_k(projected)
        if self.place is not None and places is not None:
            keys = keys + self.place(places)
        return keys, self.attn.to_v(projected)

    def queries(self, normed: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """(B, T, C) image tokens of one level -> (B, T, inner)."""
        queries = self.attn.to_q(normed)
        if self.place is None:
            return queries
        cells = cell_boxes(grid_of_tokens(normed.shape[1], latent_size), normed.device)  # (T, 4)
        return queries + self.place(fourier_box_features(cells).to(queries.dtype))

    def forward(self, x: Tensor, condition: SubjectCondition) -> Tensor:
        """(B, T, C) image tokens -> (B, T, C); rows that are not active come back as they are."""
        rows = condition.active_rows
        if rows is None:
            return self._fuse(x, condition)
        if len(rows) == 0:
            return x
        return x.index_copy(0, rows, self._fuse(x[rows], condition))

    def _fuse(self, x: Tensor, condition: SubjectCondition) -> Tensor:
        rows = condition.active_rows
        # Asked in two steps: compiled code that has read the name is good for this one layer only.
        cached = condition.key_values.get(self.name) if condition.key_values else None
        if cached is None:
            places = condition.token_places
            cached = self.keys_values(
                _of_rows(condition.tokens, rows), None if places is None else _of_rows(places, rows)
            )
        keys, values = cached
        normed = self.norm1(x)  # (B, T, C)
        keys = torch.cat([self.attn.to_k(normed), keys], dim=1)  # (B, T + N, inner)
        values = torch.cat([self.attn.to_v(normed), values], dim=1)
        mask = attention_bias(condition, x.shape[1], x.dtype)
        scale = (condition.beta * _of_rows(condition.factor, rows))[:, None, None].to(x.dtype)  # (B, 1, 1)
        latent_size = (condition.location.shape[-2], condition.location.shape[-1])
        queries = self.queries(normed, latent_size)  # (B, T, inner)
        # In x's dtype: under autocast the gates' float32 would pass on to x and to all that is kept for backward.
        attn_gate, dense_gate = self.alpha_attn.tanh().to(x.dtype), self.alpha_dense.tanh().to(x.dtype)
        x = x + scale * attn_gate * self.attn.attend(queries, keys, values, mask)
        return x + scale * dense_gate * self.ff(self.norm2(x))  # (B, T, C)


def attention_bias(condition: SubjectCondition, num_image_tokens: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to the logits: 0 for image keys, log w or -inf for subject keys; None where nothing is to be added.

    Returns:
        (A, 1, 1, T + N) for the active rows, or (A, 1, T, T + N) when tokens are visible inside their boxes only.
    """
    keep, strength, boxes, rows = condition.keep, condition.log_strength, condition.token_boxes, condition.active_rows
    if keep is None and strength is None and boxes is None:
        return None
    tokens = _of_rows(condition.tokens, rows)
    bias = tokens.new_zeros(tokens.shape[:2], dtype=dtype) if strength is None else _of_rows(strength, rows).to(dtype)
    if keep is not None:
        bias = bias.masked_fill(~_of_rows(keep, rows), float("-inf"))
    bias = bias[:, None, None]  # (A, 1, 1, N)
    if boxes is not None:
        size = grid_of_tokens(num_image_tokens, (condition.location.shape[-2], condition.location.shape[-1]))
        inside = rasterise_boxes(_of_rows(boxes, rows), size).flatten(2).transpose(1, 2)  # (A, T, N)
        bias = bias.masked_fill(~inside[:, None], float("-inf"))  # (A, 1, T, N)
    return torch.cat([bias.new_zeros(*bias.shape[:-1], num_image_tokens), bias], dim=-1)


def _of_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values[rows]


def _gates_as_scalars(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    for gate in ("alpha_attn", "alpha_dense"):
        if state[prefix + gate].numel():  # ZeRO-3 leaves an empty tensor where another process holds the value
            state[prefix + gate] = state[prefix + gate].reshape(())


def _gates_as_vectors(module: nn.Module, state: dict[str, Tensor], prefix: str, *ignored: Any) -> None:
    for gate in ("alpha_attn", "alpha_dense"):
        if prefix + gate in state:
            state[prefix + gate] = state[prefix + gate].reshape(1)
