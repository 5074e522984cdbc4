"""What adapters and LoRA have in common: new weights beside a frozen base, learnt with DreamBooth's prompts and prior.

The placeholder stands for a rare token that exists already, as with `methods/dreambooth.py`; on request its vector is
trained too. Without concepts the new weights are fine-tuned on pairs of pictures and texts (`pairs.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from infer.refine.method import Concept, MethodSettings, RefineBase
from infer.refine.rare_token import AUTO, RareToken, choose_tokens, tell, token_rows
from infer.refine.weight_tuning import WeightModule
from infer.refine.words import new_ids
from model.learned_words import LearnedWord


class AdditionSettings(MethodSettings):
    """`options` that both methods know."""

    weight_decay: float = Field(1e-2, ge=0)
    identifier: str = AUTO  # [V], a word of the vocabulary; auto: the rarest; of several concepts joined by +
    train_word: bool = False  # train the placeholder's vector too, from [V]'s on
    prior_weight: float = Field(1.0, ge=0)  # lambda, of the regularisation's error


@dataclass(frozen=True)
class IdentifiedWords:
    """The placeholders of a run, and the tokens that they stand for."""

    words: tuple[LearnedWord, ...] = ()
    identifiers: tuple[RareToken, ...] = ()


def identified_words(base: RefineBase, concepts: Sequence[Concept], settings: AdditionSettings) -> IdentifiedWords:
    """A word a concept, with the vectors of its identifier; none without concepts.

    Raises:
        UserError: a placeholder or an identifier that cannot be used.
    """
    if not concepts:
        return IdentifiedWords()
    tokens = choose_tokens(base.pipeline.tokenizer, settings.identifier, len(concepts))
    tell([concept.placeholder for concept in concepts], tokens, "stands for the identifier")
    words = [
        LearnedWord.plain(concept.placeholder, new_ids(base, concept, len(token.ids)), token_rows(base, token))
        for concept, token in zip(concepts, tokens, strict=True)
    ]
    return IdentifiedWords(tuple(words), tuple(tokens))


class AdditionModule(WeightModule):
    """See `RefineModule`; a method adds its weights as a submodule and their values to `tensors`."""

    def __init__(self, base: RefineBase, known: IdentifiedWords, settings: AdditionSettings) -> None:
        super().__init__(base, known.words, {}, settings.prior_weight, keep_start=False)
        self.identifiers = [token.word for token in known.identifiers]
        if self.with_words:
            self.learned.requires_grad_(settings.train_word)

    def words(self) -> dict[str, dict[str, Any]]:
        told = super().words()
        return {name: told[name] | {"identifier": word} for name, word in zip(told, self.identifiers, strict=True)}


def identified_thing(concept: Concept) -> str:
    """What a concept is called in prompts: "z dog", read as "[V] dog"."""
    return f"{concept.placeholder} {concept.class_word}"
