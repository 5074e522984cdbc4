"""A refinement as a task of the trainer's loop: its samples, its module, previews on the way, the file at the end."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from data_pipeline.errors import UserError
from data_pipeline.settings import settings_of
from infer.grid import make_grid
from infer.refine.base import open_base
from infer.refine.method import Concept, MethodSettings, RefineBase, RefineBatch
from infer.refine.methods import load_method
from infer.refine.pairs import PairSamples, read_pairs
from infer.refine.prompts import fill, templates_of
from infer.refine.references import Shown, shown_cutouts
from infer.refine.refinement import Refinement, write_refinement
from infer.refine.regularisation import open_regularisation
from infer.refine.samples import CollatedSamples, RefineSample, RefineSamples, collate
from infer.refine.settings import ConceptSettings, RefineSettings
from infer.refine.subject_images import find_pictures, read_pictures, unlike_pictures, with_captions
from infer.subjects import Subject

PREVIEW_CELL = 96  # pixels, side of each picture of the preview in the file
PAIRS_SHOWN = 4  # whose texts are drawn as previews
LATENTS_KEPT = 2048  # pictures; 134 MB at 512 px


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
        kinds = {concept.kind for concept in settings.concepts.values()} or {"subject"}
        if len(kinds) > 1:
            raise UserError(
                "concepts: subjects and styles cannot be learnt in one run; refine them one after the other"
            )
        templates = templates_of(kinds.pop(), settings.templates)
        self.base = open_base(settings.model, settings.plain, str(device), templates)
        self.size = settings.size or _trained_size(self.base)
        self.concepts = [self._concept(word, told) for word, told in settings.concepts.items()]
        self.cutouts = [shown_cutouts(concept, settings.references) for concept in self.concepts]
        method = load_method(settings.method)
        self.things = [method.thing(concept, own) for concept in self.concepts]
        torch.manual_seed(settings.seed)
        self.module = method.build(self.base, self.concepts, own).to(device)
        self.base.pipeline.references = tuple(
            Subject(concept.class_word, cutouts[: settings.references], word=concept.placeholder)
            for concept, cutouts in zip(self.concepts, self.cutouts, strict=True)
            if cutouts
        )
        self.shown = [concept.pictures[0] for concept in self.concepts]  # beside the previews
        self.previews = [fill(text, thing) for text in settings.report.preview_prompts for thing in self.things]
        self.dataset: Dataset[RefineSample] = (
            self._subject_samples(templates) if settings.pairs is None else self._pair_samples(settings.pairs)
        )
        self.loader_workers = settings.workers
        self.exported = False  # whether the file is written, by this process
        self._latents: OrderedDict[bytes, Tensor] = OrderedDict()  # by picture, the one used last at the end

    def _subject_samples(self, templates: tuple[str, ...]) -> RefineSamples:
        sets = open_regularisation(self.settings, self.base, self.concepts, self.size)
        variation, references = self.own.variation, self.settings.references
        return RefineSamples(self.concepts, self.things, templates, variation, self.settings.seed, sets, references)

    def _pair_samples(self, folder: Path) -> PairSamples:
        pairs, warnings = read_pairs(folder, self.base.pipeline.tokenizer)
        samples = PairSamples(pairs, self.size, self.own.variation, self.settings.seed)
        for line in warnings + samples.check_pictures():
            print(f"warning: {line}")
        chosen = range(min(len(pairs), PAIRS_SHOWN))
        self.shown = [samples.picture(index) for index in chosen]
        self.previews = [pairs[index].text for index in chosen]
        return samples

    def _concept(self, placeholder: str, told: ConceptSettings) -> Concept:
        # Backgrounds that count for less, and boxes of what is shown.
        apart = told.kind == "subject" and (self.own.variation.background_weight < 1 or self.settings.references > 0)
        pictures, warnings = read_pictures(find_pictures(told.images), self.size, tell_apart=apart)
        if told.kind == "subject":
            pictures = with_captions(pictures, told.class_word)
        encoder = self.base.pipeline.image_encoder
        for line in warnings + ([] if encoder is None or told.kind == "style" else unlike_pictures(pictures, encoder)):
            print(f"warning: {line}")
        return Concept(placeholder, told.class_word, told.kind, pictures)

    def collate(self, items: list[RefineSample]) -> CollatedSamples:
        return collate(items)

    def batch(self, collated: CollatedSamples) -> RefineBatch:
        latents = self._latents_of(collated)  # (B, C, h, w)
        valid = loss_weights(collated.valid, latents.shape[-2:]).to(self.device)
        return RefineBatch(
            latents, valid, collated.prompts, collated.class_prompts,
            collated.prior.to(self.device), collated.numbers,
            tuple(None if shown is None else self._shown(shown) for shown in collated.shown),
        )  # fmt: skip

    def _shown(self, shown: Shown) -> Subject:
        concept, cutouts = self.concepts[shown.concept], self.cutouts[shown.concept]
        chosen = [cutouts[index] for index in shown.pictures]
        return Subject(concept.class_word, chosen, shown.box, word=concept.placeholder)

    def _latents_of(self, collated: CollatedSamples) -> Tensor:
        """(B, C, h, w). The resized pictures of a batch go through the autoencoder together, the others each by itself.

        Those come again and again and are kept. Encoded among others their last bits would depend on which of them were
        kept already, and a resumed run would part from its past.
        """
        fresh = iter(self._encoded(collated.pixels[collated.resized]) if collated.resized.any() else ())
        each = zip(collated.pixels, collated.resized.tolist(), strict=True)
        return torch.stack([next(fresh) if resized else self._kept(pixels[None])[0] for pixels, resized in each])

    @torch.no_grad()
    def _encoded(self, pixels: Tensor) -> Tensor:
        """Scaled latents (N, C, h, w) of pictures (N, 3, S, S), 0..1."""
        vae = self.base.pipeline.vae
        posterior = vae.encode(pixels.to(self.device, vae.dtype) * 2 - 1).latent_dist
        return (posterior.mean * vae.config.scaling_factor).float()

    def _kept(self, pixels: Tensor) -> Tensor:
        """Of a picture (1, 3, S, S), encoded the first time that it comes."""
        key = hashlib.sha256(pixels.numpy().tobytes()).digest()
        latents = self._latents.pop(key, None)
        if latents is None:
            latents = self._encoded(pixels)
        self._latents[key] = latents
        if len(self._latents) > LATENTS_KEPT:
            self._latents.popitem(last=False)
        return latents

    def keys(self, collated: CollatedSamples) -> list[str]:
        return []

    def counts(self, collated: CollatedSamples) -> dict[str, int]:
        return {}

    def validate(self, picture: Path) -> dict[str, float]:
        """Draw the preview prompts with what is learnt so far, and say how like the pictures they look."""
        drawn = self._preview()
        rows = [Image.fromarray(one.rgba).convert("RGB") for one in self.shown]
        make_grid(drawn, rows).save(picture)
        encoder = self.base.pipeline.image_encoder
        if encoder is None:
            return {}
        known = [picture for concept in self.concepts for picture in concept.pictures] or self.shown
        own = _vectors(encoder, [picture.rgba for picture in known])
        shown = _vectors(encoder, [np.array(one.convert("RGBA")) for one in drawn])
        return {"similarity": float((shown @ own.T).mean())}

    def export(self, folder: Path) -> None:
        """Write the file."""
        write_refinement(self.refinement(), self.settings.output)
        self.exported = True

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
            references={one.said: tuple(one.references) for one in self.base.pipeline.references},
        )  # fmt: skip

    def _preview(self) -> list[Image.Image]:
        report = self.settings.report
        seeds = [torch.Generator().manual_seed(index) for index in range(len(self.previews))]
        drawn = self.base.pipeline(
            self.previews, num_inference_steps=report.preview_steps, guidance="joint",
            guidance_scale=report.preview_guidance, generator=seeds,
        )  # fmt: skip
        return list(drawn.images)


def loss_weights(valid: Tensor, size: Sequence[int]) -> Tensor:
    """How much each cell of the latents counts, of how much each pixel does: (B, 1, S, S) -> (B, 1, *size).

    A cell counts when half of its pixels do, and then as much as those do on average.
    """
    covered = functional.interpolate((valid > 0).float(), size=tuple(size), mode="area")
    weights = functional.interpolate(valid, size=tuple(size), mode="area")
    return torch.where(covered >= 0.5, weights / covered.clamp(min=0.5), 0.0)


def method_settings(settings: RefineSettings) -> MethodSettings:
    """The method's own settings, `options` checked; for pairs, over those that the method has for them.

    Raises:
        UserError: an unknown key or a value that cannot be.
    """
    method = load_method(settings.method)
    for_pairs = {} if settings.pairs is None else method.pair_options or {}
    return settings_of(method.settings, for_pairs | settings.options, "options")


def _trained_size(base: RefineBase) -> int:
    sample: Any = base.pipeline.unet.config.sample_size
    return int(sample if isinstance(sample, int) else sample[0]) * int(base.pipeline.vae_scale_factor)


def _vectors(encoder: Any, pictures: Sequence[np.ndarray]) -> Tensor:
    """Unit vectors (N, P) of RGBA pictures."""
    from model.reference import prepare_reference

    frames = torch.stack([prepare_reference(rgba, encoder.image_size) for rgba in pictures])
    with torch.no_grad():
        return functional.normalize(encoder(frames.to(encoder.device, encoder.dtype))[0].float(), dim=-1)
