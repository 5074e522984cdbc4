"""DreamBooth: the whole UNet, optionally the text encoder, for "a [V] dog" (Ruiz et al., arXiv 2208.12242).

[V] is a rare token that exists already. In prompts the placeholder stands for it, as with every other method: "a z dog"
is read as "a [V] dog", and nobody needs to know which token it was. Regularisation by generated pictures of the class
is the paper's prior preservation. Defaults: the paper's, at Stable Diffusion's learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from data_pipeline.errors import UserError
from infer.pipeline import SubjectDiffusionPipeline
from infer.refine.method import Concept, MethodSettings, RefineBase
from infer.refine.rare_token import AUTO, RareToken, choose_tokens, tell, token_rows
from infer.refine.refinement import Refinement
from infer.refine.weight_deltas import base_weights, packed_half, put_weights, restored
from infer.refine.weight_tuning import WeightModule
from infer.refine.words import new_ids
from model.learned_words import LearnedWord


class DreamBoothSettings(MethodSettings):
    """`options` of dreambooth."""

    steps: int = Field(1000, gt=0)
    batch_size: int = Field(2, gt=0)  # with regularisation, half of them are its: one picture and one of the class
    learning_rate: float = Field(5e-6, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    identifier: str = AUTO  # [V], a word of the vocabulary; auto: the rarest; of several concepts joined by +
    text_encoder: bool = False  # train it too, with [V]'s own embedding
    prior_weight: float = Field(1.0, ge=0)  # lambda, of the regularisation's error


class DreamBoothModule(WeightModule):
    """See `RefineModule`.

    Args:
        identifiers: [V] of each word.
    """

    def __init__(
        self,
        base: RefineBase,
        words: Sequence[LearnedWord],
        identifiers: Sequence[RareToken],
        settings: DreamBoothSettings,
    ) -> None:
        parts: dict[str, nn.Module] = {"unet": base.pipeline.unet}
        if settings.text_encoder:
            parts["text_encoder"] = base.pipeline.text_encoder
        super().__init__(base, words, parts, settings.prior_weight, keep_start=True)
        if self.with_words:
            self.learned.requires_grad_(settings.text_encoder)
        self.identifiers = [token.word for token in identifiers]

    def tensors(self) -> dict[str, Tensor]:
        return packed_half(self.start, self.weights()) | super().tensors()

    def words(self) -> dict[str, dict[str, Any]]:
        told = super().words()
        return {name: told[name] | {"identifier": word} for name, word in zip(told, self.identifiers, strict=True)}


class DreamBooth:
    """See `RefineMethod`."""

    name = "dreambooth"
    settings: type[MethodSettings] = DreamBoothSettings
    pair_options: dict[str, Any] | None = {}
    has_strength = False

    def thing(self, concept: Concept, settings: Any) -> str:
        return f"{concept.placeholder} {concept.class_word}"

    def joins(self, settings: Any) -> bool:
        return False

    def build(self, base: RefineBase, concepts: Sequence[Concept], settings: DreamBoothSettings) -> DreamBoothModule:
        """No concepts: the task of pairs."""
        tokens = choose_tokens(base.pipeline.tokenizer, settings.identifier, len(concepts)) if concepts else []
        tell([concept.placeholder for concept in concepts], tokens, "stands for the identifier")
        words = [
            LearnedWord.plain(concept.placeholder, new_ids(base, concept, len(token.ids)), token_rows(base, token))
            for concept, token in zip(concepts, tokens, strict=True)
        ]
        return DreamBoothModule(base, words, tokens, settings)

    def install(self, pipeline: SubjectDiffusionPipeline, refinements: Sequence[Refinement]) -> None:
        if len(refinements) > 1:
            raise UserError(
                f"{refinements[0].label} and {refinements[1].label}: each replaces the whole UNet, and nothing tells "
                "how to join two; learn both subjects in one run, or with custom-diffusion, whose files merge"
            )
        put_weights(pipeline, restored(refinements[0], base_weights(pipeline)))


METHOD = DreamBooth()
