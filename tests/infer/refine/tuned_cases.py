"""A tiny base to tune, two subjects of one colour each, and batches of them, for the methods that change weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infer.pipeline import SubjectDiffusionPipeline
from infer.refine.base import open_base
from infer.refine.method import Concept, RefineBase, RefineBatch, RefineModule
from infer.refine.prompts import SUBJECT_TEMPLATES
from infer.refine.refinement import Refinement
from infer.refine.subject_images import SubjectPicture
from tests.infer.tiny_model import TinyModel
from train.draws import SampleDraws


def tuned_base(tiny: TinyModel, plain: bool = False) -> RefineBase:
    """A base of its own: it may be changed."""
    return open_base(str(tiny.subject if not plain else tiny.base), plain, "cpu", SUBJECT_TEMPLATES)


def concept(placeholder: str = "z", class_word: str = "dog", colour: int = 0) -> Concept:
    rgba = np.full((64, 64, 4), 255, np.uint8)
    rgba[..., colour] = 30
    return Concept(placeholder, class_word, "subject", [SubjectPicture(Path("one.png"), rgba)])


def batch(*prompts: str, prior: tuple[bool, ...] | None = None, seed: int = 0) -> RefineBatch:
    """A sample a prompt; latents by `seed`."""
    latents = torch.randn(len(prompts), 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    told = torch.tensor(prior or (False,) * len(prompts))
    return RefineBatch(
        latents, torch.ones(len(prompts), 1, 8, 8), prompts, prompts, told, tuple(range(len(prompts)))
    )  # fmt: skip


def loss_of(module: RefineModule, samples: RefineBatch) -> tuple[Tensor, dict[str, Tensor]]:
    return module(samples, SampleDraws(0, 0, samples.numbers), 0)


def tune(module: RefineModule, samples: RefineBatch, steps: int = 3, rate: float = 1e-2) -> list[float]:
    """Train on one batch with one draw of noise; the losses."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss, _ = loss_of(module, samples)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def refinement_of(method: str, base: RefineBase, module: RefineModule, *concepts: Concept) -> Refinement:
    """What the file would hold."""
    told = module.words()
    words: dict[str, dict[str, Any]] = {
        c.placeholder: {"class_word": c.class_word, "kind": c.kind} | told[c.placeholder] for c in concepts
    }
    return Refinement(method, base.name, base.fingerprint, words, module.tensors())


def draw(pipeline: SubjectDiffusionPipeline, prompt: str) -> Tensor:
    """Latents of one picture."""
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        prompt, num_inference_steps=2, output_type="latent", guidance="joint", generator=generator
    ).images  # fmt: skip
