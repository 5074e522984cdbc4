"""A refinement as a task of the trainer's loop: its samples, its module, previews on the way, the file at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from data_pipeline.errors import UserError
from data_pipeline.settings import settings_of
from infer.grid import make_grid
from infer.refine.base import open_base
from infer.refine.method import Concept, MethodSettings, RefineBase, RefineBatch
from infer.refine.methods import load_method
from infer.refine.prompts import fill, templates_of
from infer.refine.refinement import Refinement, write_refinement
from infer.refine.regularisation import open_regularisation
from infer.refine.samples import CollatedSamples, RefineSample, RefineSamples, collate
from infer.refine.settings import ConceptSettings, RefineSettings
from infer.refine.subject_images import find_pictures, read_pictures, unlike_pictures

PREVIEW_CELL = 96  # pixels, side of each picture of the preview in the file


class RefineTask:
    """See `train.tasks.Task`."""

    def __init__(self, settings: RefineSettings, own: MethodSettings, device: torch.device) -> None:
        """
        Args:
            settings: of the run.
            own: the method's, checked.
        Raises:
            UserError: pictures, base or options that cannot be used.
        """
        self.settings, self.own, self.device = settings, own, device
        kinds = {concept.kind for concept in settings.concepts.values()}
        if len(kinds) > 1:
            raise UserError(
                "concepts: subjects and styles cannot be learnt in one run; refine them one after the other"
            )
        templates = templates_of(kinds.pop(), settings.templates)
        self.base = open_base(settings.model, settings.plain, str(device), templates)
        self.size = settings.size or _trained_size(self.base)
        self.concepts = [self._concept(word, told) for word, told in settings.concepts.items()]
        method = load_method(settings.method)
        self.things = [method.thing(concept, own) for concept in self.concepts]
        torch.manual_seed(settings.seed)
        self.module = method.build(self.base, self.concepts, own).to(device)
        sets = open_regularisation(settings, self.base, self.concepts, self.size)
        self.dataset = RefineSamples(self.concepts, self.things, templates, own.variation, settings.seed, sets)
        self.loader_workers = settings.workers

    def _concept(self, placeholder: str, told: ConceptSettings) -> Concept:
        pictures, warnings = read_pictures(find_pictures(told.images), self.size)
        encoder = self.base.pipeline.image_encoder
        for line in warnings + ([] if encoder is None or told.kind == "style" else unlike_pictures(pictures, encoder)):
            print(f"warning: {line}")
        return Concept(placeholder, told.class_word, told.kind, pictures)

    def collate(self, items: list[RefineSample]) -> CollatedSamples:
        return collate(items)

    @torch.no_grad()
    def batch(self, collated: CollatedSamples) -> RefineBatch:
        vae = self.base.pipeline.vae
        pixels = collated.pixels.to(self.device, vae.dtype) * 2 - 1  # (B, 3, S, S)
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor  # (B, C, h, w)
        valid = functional.interpolate(collated.valid, size=latents.shape[-2:], mode="area").to(self.device)
        return RefineBatch(
            latents.float(), (valid >= 0.5).float(), collated.prompts, collated.class_prompts,
            collated.prior.to(self.device), collated.numbers,
        )  # fmt: skip

    def keys(self, collated: CollatedSamples) -> list[str]:
        return []

    def counts(self, collated: CollatedSamples) -> dict[str, int]:
        return {}

    def validate(self, picture: Path) -> dict[str, float]:
        """Draw the preview prompts with what is learnt so far, and say how like the pictures they look."""
        drawn = self._preview()
        rows = [Image.fromarray(concept.pictures[0].rgba).convert("RGB") for concept in self.concepts]
        make_grid(drawn, rows).save(picture)
        encoder = self.base.pipeline.image_encoder
        if encoder is None:
            return {}
        own = torch.cat([_vectors(encoder, [p.rgba for p in concept.pictures]) for concept in self.concepts])
        shown = _vectors(encoder, [np.array(one.convert("RGBA")) for one in drawn])
        return {"similarity": float((shown @ own.T).mean())}

    def export(self, folder: Path) -> None:
        """Write the file."""
        write_refinement(self.refinement(), self.settings.output)

    def refinement(self) -> Refinement:
        """What is learnt so far, as its file will hold it."""
        words = self.module.words()
        told = {
            concept.placeholder: {"class_word": concept.class_word, "kind": concept.kind, "thing": thing}
            | words.get(concept.placeholder, {})
            for concept, thing in zip(self.concepts, self.things, strict=True)
        }
        sheet = make_grid(self._preview(), [], cell=PREVIEW_CELL)
        plain = self.settings.model_dump(mode="json") | {"options": self.own.model_dump(mode="json")}
        return Refinement(
            self.settings.method, self.base.name, self.base.fingerprint, told, self.module.tensors(),
            settings=plain, steps=self.own.steps, preview=np.array(sheet.convert("RGB")),
        )  # fmt: skip

    def _preview(self) -> list[Image.Image]:
        report = self.settings.report
        prompts = [fill(template, thing) for template in report.preview_prompts for thing in self.things]
        seeds = [torch.Generator().manual_seed(index) for index in range(len(prompts))]
        drawn = self.base.pipeline(
            prompts, num_inference_steps=report.preview_steps, guidance="joint",
            guidance_scale=report.preview_guidance, generator=seeds,
        )  # fmt: skip
        return list(drawn.images)


def method_settings(settings: RefineSettings) -> MethodSettings:
    """The method's own settings, `options` checked.

    Raises:
        UserError: an unknown key or a value that cannot be.
    """
    return settings_of(load_method(settings.method).settings, settings.options, "options")


def _trained_size(base: RefineBase) -> int:
    sample: Any = base.pipeline.unet.config.sample_size
    return int(sample if isinstance(sample, int) else sample[0]) * int(base.pipeline.vae_scale_factor)


def _vectors(encoder: Any, pictures: Sequence[np.ndarray]) -> Tensor:
    """Unit vectors (N, P) of RGBA pictures."""
    from model.reference import prepare_reference

    frames = torch.stack([prepare_reference(rgba, encoder.image_size) for rgba in pictures])
    with torch.no_grad():
        return functional.normalize(encoder(frames.to(encoder.device, encoder.dtype))[0].float(), dim=-1)
