"""Bound: the real thing. Where the protocol can render what was asked (toybox) that render, else another photo."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from data_pipeline.settings import Settings
from infer.drawing import usable_device
from infer.evaluate.backbones import as_picture
from infer.evaluate.cases import Case, EvaluatedSubject
from infer.evaluate.methods import Answer, Prepared
from infer.evaluate.settings import EvaluateSettings
from infer.loading import hush_libraries, load_base
from train.pictures import to_uint8

BOUND = True


class MethodSettings(Settings):
    """Whether the picture passes through an autoencoder first."""

    decode_with: str | None = None  # base whose autoencoder it passes: the bound of all that is drawn in its latents


class RealRender:
    """Hands out a true picture of the subject that no method was given."""

    model = ""

    def __init__(self, vae: AutoencoderKL | None) -> None:
        self.vae = vae

    def prepare(self, subjects: Sequence[EvaluatedSubject]) -> Prepared:
        return Prepared()

    def draw(self, cases: Sequence[Case]) -> list[Answer]:
        pictures = [_real(case) for case in cases]
        if self.vae is not None:
            pictures = [self._decoded(picture) for picture in pictures]
        return [Answer(picture, case.boxes) for picture, case in zip(pictures, cases, strict=True)]

    @torch.no_grad()
    def _decoded(self, picture: Image.Image) -> Image.Image:
        assert self.vae is not None
        size = self.vae.config.sample_size
        processor = VaeImageProcessor(vae_scale_factor=2 ** (len(self.vae.config.block_out_channels) - 1))
        pixels = processor.preprocess(picture, height=size, width=size).to(self.vae.device)  # (1, 3, H, W) -1..1
        latents = self.vae.encode(pixels).latent_dist.mean
        shown: Image.Image = processor.postprocess(self.vae.decode(latents).sample)[0]
        return shown


def _real(case: Case) -> Image.Image:
    if case.truth is not None:
        return Image.fromarray(to_uint8(case.truth.real))
    others = case.subjects[0].others
    return as_picture(others[case.seed % len(others)])


def answers(case: Case, settings: MethodSettings) -> bool:
    return case.truth is not None or (len(case.subjects) == 1 and bool(case.subjects[0].others))


def create(settings: MethodSettings, run: EvaluateSettings) -> RealRender:
    if settings.decode_with is None:
        return RealRender(None)
    hush_libraries()
    return RealRender(load_base(settings.decode_with).vae.to(usable_device(run.device)))
