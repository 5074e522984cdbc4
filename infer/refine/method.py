"""The one shape of every method: what is trained and how it starts, which losses, what it saves, how it is put to use.

A method is one file of `methods/` with a `MethodSettings` class and an object of `RefineMethod`, and a line in
`methods/__init__.py`. The loop is the trainer's (`task.py`); a method never steps an optimiser or writes a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from data_pipeline.settings import Settings
from infer.refine.prompts import Kind
from infer.refine.subject_images import SubjectPicture, VariationSettings
from infer.subjects import Subject
from model.losses import diffusion_target
from train.draws import SampleDraws
from train.settings import Decay

if TYPE_CHECKING:
    from infer.pipeline import SubjectDiffusionPipeline
    from infer.refine.refinement import Refinement


class MethodSettings(Settings):
    """What every method can be told; each gives its published values as defaults, and its own keys."""

    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)  # samples a process and step
    learning_rate: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay: Decay = "constant"  # of the learning rate after the warm-up
    decay_to: float = Field(0.0, ge=0, le=1)  # share of the rate that it ends at
    variation: VariationSettings = VariationSettings()

    def rate_factors(self) -> dict[str, float]:
        """Pattern (full match on a trained parameter's name) -> factor on the learning rate."""
        return {}


@dataclass(frozen=True)
class Concept:
    """A subject or style that is learnt."""

    placeholder: str  # the word that will stand for it, "z"
    class_word: str  # what it is, "dog"
    kind: Kind
    pictures: Sequence[SubjectPicture]


@dataclass(frozen=True)
class RefineBase:
    """The frozen model that a refinement belongs to."""

    pipeline: SubjectDiffusionPipeline
    name: str  # as a person gave it
    fingerprint: str  # of UNet and text encoder
    templates: tuple[str, ...]  # of the concept's kind


@dataclass(frozen=True)
class RefineBatch:
    """B samples; the first are the subject's, those of `prior` the regularisation's."""

    latents: Tensor  # (B, C, h, w) scaled
    valid: Tensor  # (B, 1, h, w) 0..1, where the loss counts
    prompts: tuple[str, ...]  # B, with placeholders
    class_prompts: tuple[str, ...]  # B, the class word in their place
    prior: Tensor  # (B,) bool, of the regularisation
    numbers: tuple[int, ...]  # B sample numbers, for what a method draws by itself
    subjects: tuple[Subject | None, ...]  # B, shown beside the prompt, each in its place; None: nothing is


class RefineModule(nn.Module):
    """What a method trains. The base is held outside `parameters()` unless the method trains parts of it."""

    def __init__(self, base: RefineBase) -> None:
        super().__init__()
        self.__dict__["base"] = base  # not a submodule: frozen, and no part of what is saved

    base: RefineBase

    def forward(self, batch: RefineBatch, draws: SampleDraws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """What the file holds, on the CPU."""
        raise NotImplementedError

    def words(self) -> dict[str, dict[str, Any]]:
        """The learned words the file brings: placeholder -> {"vectors": K, …}, JSON; none for methods without."""
        return {}


class RefineMethod(Protocol):
    """One method."""

    name: str  # as on the command line
    settings: type[MethodSettings]
    pair_options: dict[str, Any] | None  # `options` for pairs (`pairs.py`), over the defaults; None: cannot learn them
    has_strength: bool  # whether `Refinement.strength` has a meaning

    def thing(self, concept: Concept, settings: Any) -> str:
        """What a concept is called in prompts: "z", or "z dog"."""
        ...

    def joins(self, settings: Any) -> bool:
        """Whether files of two runs with these settings can be used together."""
        ...

    def build(self, base: RefineBase, concepts: Sequence[Concept], settings: Any) -> RefineModule:
        """A module at its start.

        Args:
            concepts: none for pairs.
        Raises:
            UserError: a setting that does not fit this base or these concepts.
        """
        ...

    def install(self, pipeline: SubjectDiffusionPipeline, refinements: Sequence[Refinement]) -> None:
        """Put refinements of this method to use in a pipeline, all at once.

        Raises:
            UserError: they cannot be used together.
        """
        ...


def denoising_error(scheduler: Any, prediction: Tensor, batch: RefineBatch, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Mean squared error of each sample over where its loss counts: (B,).

    Args:
        prediction, noise: (B, C, h, w).
        timesteps: (B,).
    """
    error = (prediction.float() - diffusion_target(scheduler, batch.latents, noise, timesteps).float()).square()
    weights = batch.valid.expand_as(error)  # (B, C, h, w)
    return (error * weights).flatten(1).sum(dim=1) / weights.flatten(1).sum(dim=1).clamp(min=1e-6)


def prior_weighted(errors: Tensor, prior: Tensor, weight: float) -> Tensor:
    """Mean over the subject's samples plus `weight` times the mean over the regularisation's: scalar.

    DreamBooth, arXiv 2208.12242, equation 2; the same sum in Custom Diffusion.
    """
    own = errors[~prior].mean() if bool((~prior).any()) else errors.new_zeros(())
    other = errors[prior].mean() if bool(prior.any()) else errors.new_zeros(())
    return torch.add(own, other, alpha=weight)
