"""The subject model: adapters, keys and values, text encoder and projections trained on a base that otherwise stays.

Loss: denoising error under random condition dropout, plus the attention-map loss that ties each subject's supervised
tokens to its mask (Subject-Diffusion, arXiv 2307.11410, equations 4 and 6).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer

from model.attention_maps import AttentionMapRecorder, install_recording
from model.composition import SubjectDiffusionModel
from model.inputs import Drop, SubjectInputs, draw_drops, drop_conditions
from model.losses import attention_map_loss
from model.prompt import add_placeholder
from model.sampling import denoise, initial_latents
from model.saving import save_subject_model
from model.subject_adapter import SubjectAdapter
from train.diffusion_batch import DiffusionBatch, draw_references
from train.inputs_folder import input_folder
from train.model_card import write_card
from train.pictures import save_grid
from train.settings import DiffusionSettings, TrainSettings, load_model_settings
from train.tasks.base import DiffusionData, denoising_loss, noised


class SubjectTraining(nn.Module):
    """The subject model and its two losses."""

    def __init__(self, model: SubjectDiffusionModel, scheduler: DDIMScheduler, settings: DiffusionSettings) -> None:
        super().__init__()
        self.model, self.scheduler, self.settings = model, scheduler, settings
        self.table = {
            Drop.ALL: settings.drop_all,
            Drop.TEXT: settings.drop_text,
            Drop.LOCATION: settings.drop_location,
            Drop.SUBJECTS: settings.drop_subjects,
        }

    def forward(self, batch: DiffusionBatch, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        drops = draw_drops(len(batch.latents), self.table, generator).to(batch.latents.device)
        timesteps, noise, noisy = noised(self.scheduler, batch.latents, generator)
        recorder = AttentionMapRecorder(batch.supervised) if self.settings.attention_loss_weight else None
        inputs = drop_conditions(draw_references(batch, generator), drops)
        prediction = self.model(noisy, timesteps, inputs, recorder=recorder)
        gamma = self.settings.snr_gamma
        weights = mask_weights(batch, self.settings.mask_weight)
        error = denoising_loss(self.scheduler, prediction, batch.latents, noise, timesteps, gamma, weights)
        if recorder is None:
            return error, {"denoising": error}
        # A row whose text was dropped has no supervised tokens left.
        named = inputs.subject_keep & (inputs.placeholder_positions >= 0)  # (B, S)
        attention = attention_map_loss(recorder.maps, batch.masks, named, kind=self.settings.attention_loss_kind)
        return error + self.settings.attention_loss_weight * attention, {"denoising": error, "attention": attention}


def mask_weights(batch: DiffusionBatch, inside: float) -> Tensor:
    """(B, 1, h, w): `inside` where a latent cell is wholly covered by entities, 1 where none is."""
    size = (batch.latents.shape[2], batch.latents.shape[3])
    covered = functional.adaptive_avg_pool2d(batch.masks.sum(dim=1, keepdim=True).clamp(max=1), size)  # (B, 1, h, w)
    return 1 + (inside - 1) * covered


class SubjectTask:
    """`inputs`: base, clip."""

    loader_workers = 0

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        self.settings, self.sizes = settings, load_model_settings(settings.model)
        base = input_folder(settings, "base")
        unet = UNet2DConditionModel.from_pretrained(base / "unet")
        text_encoder = CLIPTextModel.from_pretrained(base / "text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
        add_placeholder(tokenizer)
        self.scheduler = DDIMScheduler.from_pretrained(base / "scheduler")
        vae = AutoencoderKL.from_pretrained(base / "vae")
        self.data = DiffusionData(settings, vae, tokenizer, device)
        encoder = self.data.image_encoder
        torch.manual_seed(settings.seed)
        adapter = SubjectAdapter.from_unet(
            unet, text_dim=text_encoder.config.hidden_size, pooled_dim=encoder.pooled_dim,
            patch_dim=encoder.patch_dim, num_patches=encoder.num_patches, **self.sizes.adapter,
        )  # fmt: skip
        if settings.diffusion.attention_loss_weight:
            install_recording(unet)
        self.model = SubjectDiffusionModel(unet, text_encoder, adapter)
        self.trained = self.model.set_trainable(self.sizes.trained)
        self.dataset, self.collate = self.data.scenes, self.data.collate
        self.module = SubjectTraining(self.model, self.scheduler, settings.diffusion)

    @torch.no_grad()
    def validate(self, picture: Path) -> dict[str, float]:
        batch = self.data.validation_batch(0, 32)
        full = self._loss(batch, Drop.NOTHING)
        without = self._loss(batch, Drop.SUBJECTS)
        shown = self.data.validation_batch(0, 8)
        drawn, plain = self._draw(shown.inputs, 0), self._draw(_without_subjects(shown.inputs), 0)
        real = self.data.draw(shown.latents)
        rows = [[x for i in (2 * y, 2 * y + 1) for x in (real[i], drawn[i], plain[i])] for y in range(4)]
        both = [f"{self.data.unseen[2 * y].caption} | {self.data.unseen[2 * y + 1].caption}" for y in range(4)]
        save_grid(rows, picture, captions=both, scale=3)
        return {"loss": full, "loss_without_subjects": without, "gain": without - full}

    def _loss(self, batch: DiffusionBatch, drop: Drop) -> float:
        generator = torch.Generator().manual_seed(0)
        timesteps, noise, noisy = noised(self.scheduler, batch.latents, generator)
        drops = torch.full((len(batch.latents),), int(drop), device=batch.latents.device)
        prediction = self.model(noisy, timesteps, drop_conditions(batch.inputs, drops))
        gamma = self.module.settings.snr_gamma
        return float(denoising_loss(self.scheduler, prediction, batch.latents, noise, timesteps, gamma))

    def _draw(self, inputs: SubjectInputs, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        config = self.model.unet.config
        shape = (len(inputs), config.in_channels, config.sample_size, config.sample_size)
        latents = initial_latents(self.scheduler, shape, steps=25, generator=generator, device=self.data.device)
        latents = denoise(self.model, self.scheduler, latents, inputs, steps=25, text_scale=3.0, guidance="joint")
        return self.data.draw(latents)

    def export(self, folder: Path) -> None:
        count = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        device = torch.cuda.get_device_name() if self.data.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        card = write_card(self.settings, self.sizes.base, count, device)
        save_subject_model(
            folder, self.model, base=self.sizes.base, trained=self.trained, parts="trained",
            image_encoder=self.data.image_encoder, card=card,
        )  # fmt: skip


def _without_subjects(inputs: SubjectInputs) -> SubjectInputs:
    return drop_conditions(inputs, torch.full((len(inputs),), int(Drop.SUBJECTS), device=inputs.input_ids.device))
