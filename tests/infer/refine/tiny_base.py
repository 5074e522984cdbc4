"""What the methods' tests stand on: a refinement base over the tiny model, a batch made by hand, the toybox base."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from data_pipeline.toybox.archive import SubjectArchive
from infer.pipeline import SubjectDiffusionPipeline
from infer.refine.base import open_base
from infer.refine.method import Concept, RefineBase, RefineBatch, RefineModule
from infer.refine.prompts import SUBJECT_TEMPLATES, templates_of
from infer.refine.refinement import Refinement, read_refinement, write_refinement
from infer.refine.samples import RefineSamples, collate
from infer.refine.subject_images import SubjectPicture, VariationSettings
from infer.subjects import Subject
from tests.infer.tiny_model import TinyModel
from train.draws import SampleDraws

SIZE = (8, 8)


def tiny_base(model: TinyModel, plain: bool = False) -> RefineBase:
    """A base of its own, frozen: a test may add words and change weights."""
    opened = open_base(str(model.base if plain else model.subject), plain, "cpu", SUBJECT_TEMPLATES)
    return replace(opened, name="tiny")


def pictures(number: int = 2, size: int = 24) -> list[SubjectPicture]:
    """Cut-outs of two colours each."""
    made = []
    for seed in range(number):
        rgba = np.zeros((size, size, 4), np.uint8)
        rgba[4:-4, 4:-4] = [*np.random.default_rng(seed).integers(0, 255, 3), 255]
        rgba[8:-8, 6:-6, seed % 3] = 255
        made.append(SubjectPicture(Path(f"{seed}.png"), rgba))
    return made


def concept(placeholder: str = "z", class_word: str = "dog") -> Concept:
    return Concept(placeholder, class_word, "subject", pictures())


def tiny_batch(
    *prompts: str, prior: Sequence[bool] = (), placeholder: str = "z", seed: int = 0, shown: Subject | None = None
) -> RefineBatch:
    """Random latents of which the left half counts, a sample a prompt; prompts name the concept by its placeholder.

    Args:
        shown: beside each prompt.
    """
    rows = len(prompts)
    latents = torch.randn(rows, 4, *SIZE, generator=torch.Generator().manual_seed(seed))
    valid = torch.zeros(rows, 1, *SIZE)
    valid[..., :4] = 1
    named = tuple(prompt.replace(f" {placeholder} ", " dog ") for prompt in prompts)
    flags = torch.tensor(list(prior) or [False] * rows)
    return RefineBatch(latents, valid, prompts, named, flags, tuple(range(rows)), (shown,) * rows)


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


def refinement_of(method: str, module: RefineModule, *concepts: Concept, **options: object) -> Refinement:
    """What the file would hold."""
    told, base = module.words(), module.base
    words = {c.placeholder: {"class_word": c.class_word, "kind": c.kind} | told[c.placeholder] for c in concepts}
    return Refinement(method, base.name, base.fingerprint, words or told, module.tensors(), {"options": options})


def embedding_of(base: RefineBase, *words: str) -> Tensor:
    """Token embeddings of words of one token, (N, D)."""
    ids = [base.pipeline.tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in words]
    weight: Tensor = base.pipeline.text_encoder.embeddings.token_embedding.weight
    return weight[ids].detach()


def written_and_read(module: RefineModule, method: str, path: Path, **options: object) -> Refinement:
    """The module's file as `generate` reads it."""
    write_refinement(refinement_of(method, module, **options), path)
    return read_refinement(path)


def drawn(pipeline: SubjectDiffusionPipeline, prompt: str) -> Tensor:
    """Latents of one picture, (1, C, h, w)."""
    pipeline.set_progress_bar_config(disable=True)
    images: Tensor = pipeline(
        prompt, num_inference_steps=2, guidance="joint", output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return images


@functools.cache
def toybox_base() -> RefineBase:
    return open_base("toybox", False, "cpu", SUBJECT_TEMPLATES)


def toybox_concept(placeholder: str, group: str = "Animals") -> Concept:
    """A subject that no shipped model was trained with."""
    archive = SubjectArchive()
    subject = next(subject for subject in archive.of_split("heldout") if subject.group == group)
    rgba = cv2.resize(archive.cutout(subject.id), (64, 64), interpolation=cv2.INTER_AREA)
    return Concept(placeholder, subject.noun, "subject", [SubjectPicture(Path("toy.png"), rgba)])


def losses_on_toybox(
    module: RefineModule, shown: Concept, learning_rate: float, steps: int, thing: str = ""
) -> list[float]:
    """The denoising error of each of `steps` steps on four samples that stay the same, noise and all.

    Args:
        thing: what the concept is called in prompts; by default its placeholder.
    """
    vae = module.base.pipeline.vae
    samples = RefineSamples([shown], [thing or shown.placeholder], templates_of(shown.kind), VariationSettings(), 0)
    collated = collate([samples[number] for number in range(4)])
    with torch.no_grad():
        latents = vae.encode(collated.pixels * 2 - 1).latent_dist.mean * vae.config.scaling_factor
    valid = functional.interpolate(collated.valid, size=latents.shape[-2:], mode="area").round()
    batch = RefineBatch(
        latents, valid, collated.prompts, collated.class_prompts, collated.prior, collated.numbers,
        (None,) * len(latents),
    )  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], learning_rate, weight_decay=0.0)
    found = []
    for step in range(steps):
        loss, metrics = module(batch, SampleDraws(0, step, batch.numbers), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(metrics["denoising"]))
    return found
