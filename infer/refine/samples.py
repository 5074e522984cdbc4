"""Training samples of a refinement: sample n is a pure function of n, the seed and the settings.

Without regularisation every sample shows a concept; with it, odd samples are the regularisation's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from infer.refine.method import Concept
from infer.refine.prompts import draw_template, fill
from infer.refine.references import Shown, draw_references
from infer.refine.subject_images import SubjectPicture, VariationSettings, vary
from infer.subjects import Box


class RegularisationSet(Protocol):
    """Pictures of the class that keep it as it was, and what they show."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[SubjectPicture, str]:
        """A picture and its caption."""
        ...


@dataclass(frozen=True)
class RefineSample:
    """One sample as a loading process hands it on."""

    pixels: Tensor  # (3, S, S) 0..1
    valid: Tensor  # (1, S, S) 0..1
    prompt: str
    class_prompt: str
    prior: bool
    number: int
    resized: bool  # see `VariedPicture`
    shown: Shown | None = None  # photos that the model sees beside the prompt


@dataclass(frozen=True)
class CollatedSamples:
    """B samples on the CPU."""

    pixels: Tensor  # (B, 3, S, S) 0..1
    valid: Tensor  # (B, 1, S, S) 0..1
    prompts: tuple[str, ...]
    class_prompts: tuple[str, ...]
    prior: Tensor  # (B,) bool
    numbers: tuple[int, ...]
    resized: Tensor  # (B,) bool
    shown: tuple[Shown | None, ...]  # B


class RefineSamples(Dataset[RefineSample]):
    """The samples of one run."""

    def __init__(
        self,
        concepts: Sequence[Concept],
        things: Sequence[str],
        templates: Sequence[str],
        variation: VariationSettings,
        seed: int,
        regularisation: Sequence[RegularisationSet] = (),
        references: int = 0,
    ) -> None:
        """
        Args:
            concepts: what is learnt, in turn.
            things: what each is called in prompts: "z", or "z dog".
            templates: texts with {} for the thing, for pictures without a caption.
            regularisation: one set a concept, or none.
            references: how many photos of its concept each sample is shown.
        """
        self.concepts, self.things, self.templates = concepts, things, templates
        self.variation, self.seed, self.regularisation = variation, seed, regularisation
        self.references = references

    def __getitem__(self, number: int) -> RefineSample:
        rng = np.random.default_rng((self.seed % 2**63, number))
        turn, prior = (divmod(number, 2)) if self.regularisation else (number, 0)
        index, which = divmod(turn, len(self.concepts))[0], turn % len(self.concepts)
        if prior:
            known = self.regularisation[which]
            picture, caption = known[index % len(known)]
            shown = vary(picture, VariationSettings(flip=self.variation.flip), rng)
            return RefineSample(shown.pixels, shown.valid, caption, caption, True, number, shown.resized)
        concept = self.concepts[which]
        own = self._picture(concept, index)
        picture = concept.pictures[own]
        shown = vary(picture, self.variation, rng)
        template = picture.caption or draw_template(self.templates, rng)
        prompt = fill(template, self.things[which], shown.size_words)
        class_prompt = fill(template, concept.class_word, shown.size_words)
        return RefineSample(
            shown.pixels, shown.valid, prompt, class_prompt, False, number, shown.resized,
            self._shown(which, own, number, shown.box),
        )  # fmt: skip

    def _shown(self, which: int, own: int, number: int, box: Box | None) -> Shown | None:
        if not self.references:
            return None
        rng = np.random.default_rng((self.seed % 2**63, number, 2))
        pictures = len(self.concepts[which].pictures)
        return Shown(which, draw_references(own, pictures, self.references, rng), box)

    def _picture(self, concept: Concept, index: int) -> int:
        """Each picture once a pass, every pass in an order of its own."""
        turn, position = divmod(index, len(concept.pictures))
        order = np.random.default_rng((self.seed % 2**63, turn, 1)).permutation(len(concept.pictures))
        return int(order[position])


def collate(samples: Sequence[RefineSample]) -> CollatedSamples:
    """Samples of one size in one batch."""
    return CollatedSamples(
        torch.stack([sample.pixels for sample in samples]),
        torch.stack([sample.valid for sample in samples]),
        tuple(sample.prompt for sample in samples),
        tuple(sample.class_prompt for sample in samples),
        torch.tensor([sample.prior for sample in samples]),
        tuple(sample.number for sample in samples),
        torch.tensor([sample.resized for sample in samples]),
        tuple(sample.shown for sample in samples),
    )
