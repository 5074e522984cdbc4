"""Cross-attention contexts that differ by layer, for prompts with layerwise or adaptive learned words.

`encode_layer_contexts` makes them from prompts once a generation; they travel through the UNet in
`cross_attention_kwargs`, and the processor of each cross-attention layer (`attention_maps.py`) asks for its own. With
adaptive words the prompt is encoded anew inside the UNet pass (`lasr/adaptive_prompts.py`):
    c_l = (1 - w) static_l + w adaptive_l        (LASR, github.com/askerlee/AdaFace-dev)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor
from transformers import CLIPTextModel

from model.causal_text import encode_onward
from model.lasr.adaptive_prompts import AdaptivePrompts, adaptive_places, last_end
from model.learned_words import LearnedWords, Mode
from model.text_fusion import PromptEmbeddings, encode_embeddings


@dataclass(frozen=True)
class LayerContexts:
    """Contexts of B prompts of L tokens, by cross-attention layer in the order that the UNet runs them."""

    plain: Tensor  # (B, L, D) of prompts without layerwise words; of the others the mean over layers
    rows: Tensor | None  # (A,) prompts with layerwise words; None: all
    static: Tensor  # (layers, A, L, D)
    adaptive: AdaptivePrompts | None = None
    fixed: tuple[Tensor, Tensor] | None = None  # fusion "after": where (A, L, 1) and what (A, L, D) replaces states
    mode: Mode = "exact"
    told: list[Tensor] | None = None  # what the time of the pass that is running says to adaptive words
    previous: dict[int, list[Tensor]] = field(default_factory=dict)  # fast: pooled features of the pass before
    ready: Tensor | None = None  # (layers, A, Q, D) fast: adaptive states of the pass that is running
    kept: dict[int, Tensor] | None = None  # give a dict to have each layer's adaptive states (A, L, D) put there

    def at(self, time: Tensor) -> LayerContexts:
        """The contexts for one UNet pass.

        A value of its own and not a change of this one, so that checkpointing replays each pass with its own time.

        Args:
            time: (B, width) time embedding as the UNet makes it.
        """
        if self.adaptive is None:
            return self
        told, ready = self.adaptive.of_time(_of_rows(time, self.rows)), None
        if self.mode == "fast" and len(self.previous) == len(self.static):
            ready = self.adaptive.encode_all(self.previous, told, self.static[:, :, self.adaptive.start :])
        return replace(self, told=told, ready=ready)

    def __call__(self, layer: int, hidden_states: Tensor) -> Tensor:
        """Context of a layer.

        Args:
            layer: index in the order of execution.
            hidden_states: (B, T, C) what enters the layer.
        Returns:
            (B, L, D).
        """
        own = self.static[layer] if self.adaptive is None else self._mixed(layer, hidden_states)  # (A, L, D)
        return own if self.rows is None else self.plain.index_copy(0, self.rows, own)

    def _mixed(self, layer: int, hidden_states: Tensor) -> Tensor:
        """(1 - w) static + w adaptive: (A, L, D)."""
        adaptive, static = self.adaptive, self.static[layer]
        assert adaptive is not None
        if self.told is None:
            raise ValueError("layer contexts: adaptive words follow the time; call `at` before each UNet pass")
        states = None if self.ready is None else self.ready[layer]  # (A, Q, D)
        if states is None or self.mode == "fast":
            pooled = adaptive.pool(layer, _of_rows(hidden_states, self.rows))
            states = adaptive.encode(layer, pooled, self.told) if states is None else states
            if self.mode == "fast":
                self.previous[layer] = pooled
        states = torch.cat([static[:, : adaptive.start], states], dim=1)  # (A, L, D)
        if self.fixed is not None:
            states = torch.where(self.fixed[0], self.fixed[1].to(states.dtype), states)
        if self.kept is not None:
            self.kept[layer] = states
        return torch.lerp(static, states, adaptive.weight.to(states.dtype))


def encode_layer_contexts(
    text_encoder: CLIPTextModel,
    words: LearnedWords,
    layers: Sequence[Attention],
    input_ids: Tensor,
    embedded: PromptEmbeddings,
    *,
    valid: Tensor | None = None,
    adaptive_factor: Tensor | None = None,
) -> LayerContexts:
    """Static contexts of B prompts, and what adaptive words need.

    Args:
        text_encoder: of width D.
        words: at least one layerwise.
        layers: the UNet's cross-attention layers in the order of execution.
        input_ids: (B, L) prompts, at least one with a layerwise word.
        embedded: of the same prompts; layerwise rows are put in here.
        valid: (B, 1, h, w) region that features are pooled over, in training with padded pictures.
        adaptive_factor: (B,) factor on the weight of adaptive contexts, in training U(0.8, 1.4).
    """
    held = words.holds_layerwise(input_ids)  # (B,)
    rows = None if bool(held.all()) else held.nonzero().flatten()  # (A,)
    ids, tokens = _of_rows(input_ids, rows), _of_rows(embedded.tokens, rows)  # (A, L), (A, L, D)
    table = words.static_rows()  # (layers, N, D)
    row, position, column = (ids[:, :, None] == words.ids).nonzero(as_tuple=True)
    start = words.first_layerwise(ids)
    hidden = text_encoder.embeddings(inputs_embeds=_with_rows(tokens, (row, position), table[:, column]))
    hidden = hidden.unflatten(0, (len(table), -1))  # (layers, A, L, D)
    before, past = encode_onward(text_encoder, hidden[0, :, :start])  # (A, P, D), alike in all layers
    past_by_layer = past.repeat_rows(len(table))
    onward, _ = encode_onward(text_encoder, hidden[:, :, start:].flatten(0, 1), past_by_layer)
    onward = onward.unflatten(0, (len(table), -1))  # (layers, A, Q, D)
    static = torch.cat([before.expand(len(table), -1, -1, -1), onward], dim=2)  # (layers, A, L, D)
    fixed = embedded.states and (_of_rows(embedded.states[0], rows), _of_rows(embedded.states[1], rows))
    if fixed is not None:
        static = torch.where(fixed[0], fixed[1].to(static.dtype), static)

    adaptive, found = None, adaptive_places(words, ids)
    if found is not None:
        places, weight = found
        factor = 1.0 if adaptive_factor is None else _of_rows(adaptive_factor, rows)
        adaptive = AdaptivePrompts(
            text_encoder=text_encoder,
            words=words.adaptive_words(),
            makers=words.adaptive_rows(),
            layers=layers,
            rows=table,
            hidden=hidden[:, :, start:],
            past=past,
            past_by_layer=past_by_layer,
            places=(places[0], places[1] - start, places[2]),
            positions=text_encoder.embeddings.position_embedding(places[1]),
            weight=(weight * factor)[:, None, None],
            num_used=last_end(ids, text_encoder.config.vocab_size) + 1 - start,
            valid=None if valid is None else _of_rows(valid, rows),
        )
    plain = static.mean(dim=0)  # (A, L, D)
    if rows is not None:
        others = (~held).nonzero().flatten()
        plain = embedded.tokens.new_empty(embedded.tokens.shape).index_copy(0, rows, plain)
        plain = plain.index_copy(0, others, encode_embeddings(text_encoder, embedded.rows(others)))
    return LayerContexts(plain, rows, static, adaptive, fixed, words.mode)


def _with_rows(tokens: Tensor, places: tuple[Tensor, Tensor], values: Tensor) -> Tensor:
    """Token embeddings (A, L, D) once a layer, with (layers, tokens, D) values at their places: (layers · A, L, D)."""
    by_layer = tokens.expand(len(values), -1, -1, -1)  # (layers, A, L, D)
    layer = torch.arange(len(values), device=tokens.device)[:, None]
    return by_layer.index_put((layer, *places), values.to(tokens.dtype)).flatten(0, 1)


def _of_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    return values if rows is None else values[rows]
