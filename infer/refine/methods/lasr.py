"""LASR: a word with vectors of its own for each cross-attention layer, which follow what the layer sees and the time.

    c_l = (1 - w) static_l + w adaptive_l,   loss = denoising + 0.005 delta + 0.05 regulariser
    delta = static delta (each step) + 5 adaptive delta (each fifth), compared with the class word's (`model/lasr/`)
Defaults are those of the published code, github.com/askerlee/AdaFace-dev of February 2023; the paper never was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from data_pipeline.errors import UserError
from infer.refine.method import Concept, MethodSettings, RefineBase, RefineBatch, denoising_error
from infer.refine.prompts import composed
from infer.refine.subject_images import VariationSettings
from infer.refine.words import (
    SpacedWords,
    WordMethod,
    WordModule,
    class_vectors,
    fitting,
    grid_of,
    named_vectors,
    new_ids,
    noised,
    prompt_inputs,
)
from infer.refine.zero_shot_start import Start, zero_shot_vector
from infer.subjects import Subject
from model.attention_maps import cross_attention_layers
from model.inputs import SubjectInputs
from model.lasr.adaptive_embedding import AdaptiveEmbedding
from model.lasr.composition_delta import composition_delta_loss
from model.lasr.init_words import InitVectors
from model.lasr.layerwise_basis import LayerwiseBasis, basis_rank
from model.lasr.regulariser import lasr_regulariser
from model.lasr.static_embedding import StaticEmbedding
from model.layer_contexts import LayerContexts
from model.learned_words import LearnedWord, Mode
from model.text_fusion import WordRows, encode_embeddings
from train.draws import SampleDraws
from train.settings import Decay

FACTOR = (0.8, 1.4)  # in training the weight of adaptive contexts is multiplied by a number between these


class LasrSettings(MethodSettings):
    """`options` of lasr; in comments the switch of the original."""

    steps: int = Field(4000, gt=0)
    batch_size: int = Field(2, gt=0)
    learning_rate: float = Field(1e-3, gt=0)  # --lr; with `scale_learning_rate` 2e-3, as its --scale_lr does by default
    warmup_steps: int = Field(500, ge=0)
    decay: Decay = "cosine"
    decay_to: float = Field(0.2, ge=0, le=1)
    variation: VariationSettings = VariationSettings(shrink=0.5, shrink_to=0.7)  # --min_rand_scaling
    num_vectors: int = Field(1, gt=0)
    init_words: SpacedWords = ()  # --init_word; none: the class word
    init_word_weights: tuple[float, ...] = ()  # --init_word_weights; none: all alike
    negative_words: SpacedWords = ()  # --init_neg_words
    start: Start = "words"  # or the subject model's prediction from the pictures, in place of init words
    rank_ratio: float = Field(2.0, ge=1)  # --layerwise_lora_rank_token_ratio
    adaptive_weight: float = Field(0.5, ge=0, le=1)  # --lasr_emb_weight; 0: static vectors alone
    pooling: Literal["average", "attention"] = "average"
    mode: Mode = "exact"  # how pictures are drawn with it; a training step is always exact
    scale: float = Field(1.0, gt=0)  # --subj_scale
    delta_weight: float = Field(0.005, ge=0)  # --composition_delta_reg_weight
    compositions: int = Field(2, gt=0)  # --num_composition_samples_per_batch, of each process
    adaptive_delta_every: int = Field(5, gt=0)
    adaptive_delta_boost: float = Field(5.0, ge=0)
    regulariser_weight: float = Field(0.05, ge=0)  # --embedding_reg_weight


@dataclass(frozen=True)
class Compositions:
    """N prompts of a batch with a phrase added."""

    samples: Tensor  # (N,) which samples of the batch
    held: Tensor  # (N,) the same, counted among the samples whose prompts hold a word
    texts: tuple[str, ...]  # N
    subjects: tuple[Subject | None, ...]  # N, shown beside them


class LasrModule(WordModule):
    """Layerwise words with LASR's losses.

    Args:
        class_rows: (vectors of all words, D) what stands for them in the class prompts.
    """

    def __init__(
        self, base: RefineBase, words: Sequence[LearnedWord], class_rows: Tensor, settings: LasrSettings
    ) -> None:
        super().__init__(base, words, settings.mode)
        self.settings = settings
        self.adapts = any(word.adaptive is not None for word in words)
        self.register_buffer("class_rows", class_rows, persistent=False)
        self.class_rows: Tensor

    def forward(self, batch: RefineBatch, draws: SampleDraws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        told, pipeline = self.settings, self.base.pipeline
        model, size = pipeline.subject_model, grid_of(batch)
        noisy = noised(self.schedule, batch.latents, draws)
        device, count = noisy.noisy.device, len(batch.latents)
        factor = (FACTOR[0] + (FACTOR[1] - FACTOR[0]) * draws.uniform()).to(device)  # (B,)
        phrases = compositions(batch, draws, told.compositions if told.delta_weight > 0 else 0)
        fitted = (fitting(pipeline, *one) for one in zip(phrases.texts, phrases.subjects, strict=True))
        phrases = replace(phrases, texts=tuple(fitted))
        # Adaptive states exist inside a UNet pass only: every fifth time the composed prompts go through it too, on the
        # same noisy latents, and what the UNet makes of them is thrown away.
        together = self.adapts and len(phrases.texts) > 0 and step % told.adaptive_delta_every == 0
        rows = torch.arange(count, device=device)
        rows = torch.cat([rows, phrases.samples]) if together else rows  # (R,)
        prompts = [*batch.prompts, *(phrases.texts if together else ())]
        inputs = prompt_inputs(pipeline, prompts, [*batch.subjects, *(phrases.subjects if together else ())])
        valid = batch.valid[rows]
        context, condition = model.encode(inputs, size, inference=True, valid=valid, adaptive_factor=factor[rows])
        contexts = condition.layer_contexts
        if contexts is not None and together:
            contexts = condition.layer_contexts = replace(contexts, kept={})
        taken = noisy.noisy[rows].to(model.unet.dtype)
        prediction = model.denoise(taken, noisy.timesteps[rows], context, condition)[:count]
        error = denoising_error(self.schedule, prediction, batch, noisy.noise, noisy.timesteps).mean()

        nothing = error.new_full((), float("nan"))
        delta, adaptive_delta, loss = nothing, nothing, error
        if contexts is not None and phrases.texts:
            delta, adaptive = self._deltas(batch, phrases, contexts, together)
            loss = loss + told.delta_weight * delta
            if adaptive is not None:
                adaptive_delta = adaptive
                loss = loss + told.delta_weight * told.adaptive_delta_boost * adaptive_delta
        regulariser = self.regulariser()
        loss = loss + told.regulariser_weight * regulariser
        metrics = {
            "denoising": error, "delta": delta, "adaptive_delta": adaptive_delta, "regulariser": regulariser,
        }  # fmt: skip
        return loss, {name: value.detach() for name, value in metrics.items()}

    def regulariser(self) -> Tensor:
        """Sum over words: scalar."""
        parts = [
            lasr_regulariser(word.static, word.adaptive)
            for word in self.learned
            if isinstance(word.static, StaticEmbedding)
        ]
        return torch.stack(parts).sum()

    def _deltas(
        self, batch: RefineBatch, phrases: Compositions, contexts: LayerContexts, together: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Static and, after a pass with the composed prompts, adaptive composition delta loss."""
        pipeline = self.base.pipeline
        texts = [batch.prompts[sample] for sample in phrases.samples.tolist()]
        single = prompt_inputs(pipeline, texts, phrases.subjects)
        extended = prompt_inputs(pipeline, phrases.texts, phrases.subjects)
        number = len(phrases.texts)
        with torch.no_grad():
            single_class = self._class_states(single)  # (N, 1, L, D)
            extended_class = self._class_states(extended)
        if together:
            static = contexts.static[:, -number:]  # (layers, N, L, D)
        else:
            _, condition = pipeline.subject_model.encode(extended, grid_of(batch), inference=True)
            assert condition.layer_contexts is not None
            static = condition.layer_contexts.static

        def loss(before: Tensor, after: Tensor) -> Tensor:
            by_sample = (before.transpose(0, 1), after.transpose(0, 1))  # (N, layers, L, D) each
            return composition_delta_loss(*by_sample, single_class, extended_class)

        delta = loss(contexts.static[:, phrases.held], static)
        if not together or contexts.kept is None:
            return delta, None
        states = torch.stack([contexts.kept[layer] for layer in range(len(contexts.static))])  # (layers, A, L, D)
        return delta, loss(states[:, phrases.held], states[:, -number:])

    def _class_states(self, inputs: SubjectInputs) -> Tensor:
        """The text encoder's states of N prompts with the class word in the placeholder's places: (N, 1, L, D)."""
        embedded = self.base.pipeline.subject_model.embed(inputs, WordRows(self.learned.ids, self.class_rows))
        return encode_embeddings(self.base.pipeline.text_encoder, embedded)[:, None]


class Lasr(WordMethod):
    """See `RefineMethod`."""

    name = "lasr"
    settings = LasrSettings

    def build(self, base: RefineBase, concepts: Sequence[Concept], settings: LasrSettings) -> LasrModule:
        if len(concepts) > 1 and settings.init_words:
            raise UserError(
                f"init_words: {len(concepts)} concepts are learnt; leave them out, each starts from its class word"
            )
        words = [lasr_word(base, concept, settings) for concept in concepts]
        rows = [spread(class_vectors(base, concept.class_word).vectors, settings.num_vectors) for concept in concepts]
        return LasrModule(base, words, torch.cat(rows), settings)


METHOD = Lasr()


def lasr_word(base: RefineBase, concept: Concept, settings: LasrSettings) -> LearnedWord:
    """A concept's word at its start; its tokens are added to the base's tokenizer.

    Raises:
        UserError: init words, negative words or a placeholder that cannot be used.
    """
    if settings.start == "zero_shot":
        start = InitVectors(zero_shot_vector(base, concept)[None], torch.ones(1))
    elif settings.init_words:
        start = named_vectors(base, settings.init_words, settings.init_word_weights or None)
    else:
        start = class_vectors(base, concept.class_word)
    negative = named_vectors(base, settings.negative_words).vectors  # (M, D)
    unet, number = base.pipeline.unet, settings.num_vectors
    layers = [unet.get_submodule(name) for name in cross_attention_layers(unet)]
    rank = basis_rank(settings.rank_ratio, len(start.vectors), len(negative))

    def basis() -> LayerwiseBasis:
        made = LayerwiseBasis(start.vectors, negative, rank, len(layers), number)
        if settings.start == "zero_shot":
            _keep_size(made, start.vectors[0])
        return made

    static, adaptive = StaticEmbedding(basis(), start.weights), None
    if settings.adaptive_weight > 0:
        inner = [layer.to_q.out_features for layer in layers] if settings.pooling == "attention" else None
        widths, time_width = [layer.to_q.in_features for layer in layers], unet.time_embedding.linear_2.out_features
        adaptive = AdaptiveEmbedding(basis(), widths, time_width, inner)
    ids = new_ids(base, concept, number)
    return LearnedWord(concept.placeholder, ids, static, adaptive, settings.adaptive_weight, settings.scale)


def compositions(batch: RefineBatch, draws: SampleDraws, number: int) -> Compositions:
    """Prompts of a batch with phrases that the samples draw: `number` of them, its samples in turn.

    Those of the regularisation are passed over: they hold no word. A phrase depends on its sample and on how many it
    has had before, not on the batch, so that two processes see what one would.
    """
    seeds = draws.integers(2**31 - 1)  # (B,)
    own = (~batch.prior).nonzero().flatten()  # (A,)
    held = torch.arange(number if len(own) else 0, device=own.device) % max(len(own), 1)  # (N,)
    samples = own[held]
    texts = [
        composed(batch.prompts[sample], np.random.default_rng((int(seeds[sample]), turn // len(own))))
        for turn, sample in enumerate(samples.tolist())
    ]
    return Compositions(samples, held, tuple(texts), tuple(batch.subjects[sample] for sample in samples.tolist()))


def spread(vectors: Tensor, number: int) -> Tensor:
    """The class word's M tokens over K places, so that what follows stands where it does behind the word: (K, D).

    One each where M is K; otherwise means of neighbours, or repeated.
    """
    return functional.adaptive_avg_pool1d(vectors.T[None], number)[0].T


@torch.no_grad()
def _keep_size(basis: LayerwiseBasis, vector: Tensor) -> None:
    """Let the layer norms give back a vector of its own size and mean, where they would make all of norm 1."""
    width = len(vector)
    basis.norm_weight.fill_(float(vector.std(correction=0)) * math.sqrt(width))
    basis.norm_bias.fill_(float(vector.mean()) * math.sqrt(width))
