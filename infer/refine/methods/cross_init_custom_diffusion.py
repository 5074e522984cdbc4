"""Cross Initialization's start with Custom Diffusion's tuning, for faces above all: two vectors, "z person".

The word starts as the text encoder's states of the mean name (arXiv 2312.15905); then it and the cross-attention are
tuned (arXiv 2212.04488). Files merge with each other and with those of custom-diffusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from infer.refine.method import Concept, RefineBase
from infer.refine.methods.cross_initialization import cross_initial_rows, settings_names
from infer.refine.methods.custom_diffusion import CrossAttentionMethod, CrossAttentionSettings
from infer.refine.words import SpacedWords, named_vectors, new_ids
from model.learned_words import LearnedWord


class CrossInitCustomDiffusionSettings(CrossAttentionSettings):
    """`options` of cross-init-custom-diffusion."""

    num_vectors: int = Field(2, gt=0)  # K
    names: Path | None = None  # to start from, one a line; null: the nouns that the toybox models were trained with
    init_words: SpacedWords = ()  # to start from these words instead of names


class CrossInitCustomDiffusion(CrossAttentionMethod):
    """See `RefineMethod`."""

    name = "cross-init-custom-diffusion"
    settings = CrossInitCustomDiffusionSettings

    def starts(self, base: RefineBase, concepts: Sequence[Concept], settings: Any) -> list[LearnedWord]:
        names = settings_names(settings.names, settings.init_words)
        if settings.init_words:
            named_vectors(base, settings.init_words)  # refuses what the tokenizer does not know
        words = []
        for concept in concepts:
            ids = new_ids(base, concept, settings.num_vectors)
            rows = cross_initial_rows(base, concept.placeholder, ids, names)  # (K, D)
            words.append(LearnedWord.plain(concept.placeholder, ids, rows))
        return words


METHOD = CrossInitCustomDiffusion()
