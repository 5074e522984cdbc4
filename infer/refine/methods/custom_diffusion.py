"""Custom Diffusion: keys and values of every cross-attention layer, and a word's vector (arXiv 2212.04488).

Prompts say "photo of a z dog"; the word z starts from a rare token. Sizes are varied and told, regularisation keeps the
class. Defaults: the paper's code. Several files are merged in closed form (`custom_diffusion_merge.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from infer.pipeline import SubjectDiffusionPipeline
from infer.refine.custom_diffusion_merge import merged
from infer.refine.method import Concept, MethodSettings, RefineBase
from infer.refine.rare_token import AUTO, choose_tokens, tell, token_rows
from infer.refine.refinement import Refinement
from infer.refine.subject_images import VariationSettings
from infer.refine.weight_deltas import base_weights, packed_low_rank, put_weights, restored
from infer.refine.weight_tuning import WeightModule
from infer.refine.words import new_ids
from infer.refine.zero_shot_start import zero_shot_vector
from model.attention_maps import cross_attention_layers
from model.learned_words import LearnedWord

Parts = Literal["kv", "whole"]
_PRESETS: dict[str, dict[str, Any]] = {
    "objects": {},
    "faces": {"steps": 1500, "learning_rate": 5e-6, "parts": "whole"},
}


class SizeVariation(VariationSettings):
    """Two thirds of the samples smaller, one third larger, and the prompt says so (section 4.1)."""

    shrink: float = Field(2 / 3, ge=0, le=1)
    shrink_to: float = Field(1 / 3, gt=0, le=1)
    enlarge: float = Field(1 / 3, ge=0, le=1)
    say_size: bool = True


class CrossAttentionSettings(MethodSettings):
    """`options` of all methods that tune cross-attention in this way."""

    preset: Literal["objects", "faces"] = "objects"  # faces: 1500 steps, 5e-6 and parts=whole where they are not given
    steps: int = Field(250, gt=0)
    batch_size: int = Field(2, gt=0)  # with regularisation, half of them are its
    learning_rate: float = Field(1e-5, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    variation: SizeVariation = SizeVariation()
    parts: Parts = "kv"  # what is trained of each cross-attention layer: keys and values, or all of it
    word_rate: float = Field(1.0, gt=0)  # factor on the learning rate for the word's vector
    prior_weight: float = Field(1.0, ge=0)  # of the regularisation's error
    compress: float | None = Field(None, gt=0, le=1)  # keep so much of the sum of singular values; null: in full

    def rate_factors(self) -> dict[str, float]:
        return {} if self.word_rate == 1 else {r"learned\..*": self.word_rate}

    @model_validator(mode="before")
    @classmethod
    def _values_of_preset(cls, values: Any) -> Any:
        return _PRESETS.get(str(values.get("preset")), {}) | values if isinstance(values, dict) else values


class CustomDiffusionSettings(CrossAttentionSettings):
    """`options` of custom-diffusion."""

    start: Literal["token", "zero_shot"] = "token"  # of the word's vector: a token's, or the subject model's prediction
    token: str = AUTO  # that the vector starts from; auto: the rarest; of several concepts joined by +


class CustomDiffusionModule(WeightModule):
    """See `RefineModule`."""

    def __init__(self, base: RefineBase, words: Sequence[LearnedWord], settings: CrossAttentionSettings) -> None:
        parts = tuned_parts(base.pipeline.unet, settings.parts)
        super().__init__(base, words, parts, settings.prior_weight, keep_start=settings.compress is not None)
        self.compress = settings.compress

    def tensors(self) -> dict[str, Tensor]:
        now = self.weights()
        if self.compress is None:
            now = {name: value.float().cpu().clone() for name, value in now.items()}
        else:
            now = packed_low_rank(self.start, now, self.compress)
        return now | super().tensors()


def tuned_parts(unet: nn.Module, parts: Parts) -> dict[str, nn.Module]:
    """What is trained of a UNet, by name."""
    layers = cross_attention_layers(unet)
    names = [f"{layer}.{inner}" for layer in layers for inner in ("to_k", "to_v")] if parts == "kv" else layers
    return {f"unet.{name}": unet.get_submodule(name) for name in names}


class CrossAttentionMethod(ABC):
    """What methods that tune cross-attention settle of a `RefineMethod`; they differ in where the word starts."""

    pair_options: dict[str, Any] | None = None  # what tells z from its class is the word
    has_strength = False

    @abstractmethod
    def starts(self, base: RefineBase, concepts: Sequence[Concept], settings: Any) -> list[LearnedWord]:
        """The word of each concept.

        Raises:
            UserError: settings that do not fit the base or the concepts.
        """

    def thing(self, concept: Concept, settings: Any) -> str:
        return f"{concept.placeholder} {concept.class_word}"

    def joins(self, settings: CrossAttentionSettings) -> bool:
        return settings.parts == "kv"  # the merge in closed form knows no others

    def build(
        self, base: RefineBase, concepts: Sequence[Concept], settings: CrossAttentionSettings
    ) -> CustomDiffusionModule:
        return CustomDiffusionModule(base, self.starts(base, concepts, settings), settings)

    def install(self, pipeline: SubjectDiffusionPipeline, refinements: Sequence[Refinement]) -> None:
        """Put one file's weights into the UNet, or the merge of several; their words are there already."""
        base = base_weights(pipeline)
        sources = [(refinement, restored(refinement, base)) for refinement in refinements]
        put_weights(pipeline, sources[0][1] if len(sources) == 1 else merged(pipeline, sources, base))


class CustomDiffusion(CrossAttentionMethod):
    """See `RefineMethod`."""

    name = "custom-diffusion"
    settings = CustomDiffusionSettings

    def starts(self, base: RefineBase, concepts: Sequence[Concept], settings: Any) -> list[LearnedWord]:
        if settings.start == "zero_shot":
            rows = [zero_shot_vector(base, concept)[None] for concept in concepts]  # (1, D) each
        else:
            tokens = choose_tokens(base.pipeline.tokenizer, settings.token, len(concepts))
            tell([concept.placeholder for concept in concepts], tokens, "its vector starts from")
            rows = [token_rows(base, token) for token in tokens]  # (K, D) each
        return [
            LearnedWord.plain(concept.placeholder, new_ids(base, concept, len(row)), row)
            for concept, row in zip(concepts, rows, strict=True)
        ]


METHOD = CustomDiffusion()
