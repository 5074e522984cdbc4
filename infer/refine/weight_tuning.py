"""What Custom Diffusion and DreamBooth have in common: weights of the base are trained, with or without a prior.

The loss is the subject's denoising error plus a weighted one of the regularisation's samples (DreamBooth, arXiv
2208.12242, equation 2), so that the class stays what it was. Words are those of `words.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from infer.refine.method import RefineBase, RefineBatch, RefineModule, denoising_error, prior_weighted
from infer.refine.weight_deltas import Weights
from infer.refine.words import WordModule, grid_of, noised, prompt_inputs
from model.learned_words import LearnedWord
from train.draws import SampleDraws
from train.starting_models import noise_schedule


class WeightModule(WordModule):
    """Parts of the base that are trained in their place, beside words.

    Args:
        words: at their start; none: fine-tuning on pairs (`pairs.py`).
        parts: of the base's UNet or text encoder, by name (`unet`, or `unet.….attn2.to_k`); their parameters are
            trained, in float32 as `open_base` loads them.
        prior_weight: of the regularisation's error.
        keep_start: remember the weights as they are now, for a file that holds their changes.
    """

    def __init__(
        self,
        base: RefineBase,
        words: Sequence[LearnedWord],
        parts: Mapping[str, nn.Module],
        prior_weight: float,
        keep_start: bool,
    ) -> None:
        if words:
            super().__init__(base, words)
        else:
            RefineModule.__init__(self, base)
            self.schedule = noise_schedule(base.pipeline.scheduler)
        self.with_words = bool(words)
        # A module's name holds no dot.
        self.parts = nn.ModuleDict({name.replace(".", "/"): part.requires_grad_(True) for name, part in parts.items()})
        self.prior_weight = prior_weight
        # Neither trained nor in checkpoints: a resumed run starts from the same base and has them again.
        self.__dict__["start"] = {n: v.cpu().clone() for n, v in self.weights().items()} if keep_start else {}

    start: Weights

    def forward(self, batch: RefineBatch, draws: SampleDraws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.base.pipeline.subject_model
        noisy = noised(self.schedule, batch.latents, draws)
        inputs = prompt_inputs(self.base.pipeline, batch.prompts, batch.subjects)
        context, condition = model.encode(inputs, grid_of(batch), inference=True)
        prediction = model.denoise(noisy.noisy.to(model.unet.dtype), noisy.timesteps, context, condition)
        errors = denoising_error(self.schedule, prediction, batch, noisy.noise, noisy.timesteps)  # (B,)
        loss = prior_weighted(errors, batch.prior, self.prior_weight)
        told = errors.detach()
        return loss, {"denoising": told[~batch.prior].mean(), "prior": told[batch.prior].mean()}  # NaN where none is

    def tensors(self) -> dict[str, Tensor]:
        """Those of the words; a method adds its weights."""
        return super().tensors() if self.with_words else {}

    def words(self) -> dict[str, dict[str, Any]]:
        return super().words() if self.with_words else {}

    def weights(self) -> Weights:
        """The trained weights as they are now, by name; no copies."""
        return {
            f"{name.replace('/', '.')}.{inner}": value.detach()
            for name, part in self.parts.items()
            for inner, value in part.named_parameters()
        }
