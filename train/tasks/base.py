"""The base: a plain text-to-image model, stock UNet and CLIP text encoder, trained as Stable Diffusion is.

With `inputs` vae and clip it starts from nothing but these, in the sizes of the model file; otherwise it goes on from
`inputs.base` or the model file's base. Loss: denoising error (Rombach et al., arXiv 2112.10752) weighted by min-SNR.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from data_pipeline.errors import UserError
from data_pipeline.settings import Settings, settings_of
from model.base_loading import one_line_errors
from model.inputs import Drop, SubjectInputs, draw_drops, drop_conditions
from model.losses import snr_weights
from model.open_clip_conversion import convert_text_tower, load_open_clip
from model.prompt import add_placeholder
from model.saving import forget_origin
from train.data.diffusion_batch import DiffusionBatch
from train.data.diffusion_data import DiffusionData
from train.denoising import (
    NoisyLatents,
    by_band,
    denoising_loss,
    even_timesteps,
    mask_weights,
    noised,
    noised_at,
    sample_errors,
)
from train.draws import SampleDraws
from train.inputs_folder import input_folder
from train.network_options import apply_engine, as_taken, evaluation
from train.settings import DiffusionSettings, ModelSettings, TrainSettings, load_model_settings
from train.starting_models import StartingBase, image_tower, noise_schedule, starting_base
from train.validation_grid import write_grid

MEASURED, SHOWN = 32, 8  # validation samples
CHUNK = 4  # of them at once, on a device that holds the training too


class DiffusionOptions(Settings):
    """`options` of the tasks base and subject."""

    validation_steps: int = Field(25, ge=1)  # of the pictures in the validation grid
    validation_guidance: float = Field(3.0, ge=0)  # their guidance scale, joint for text and subjects


class BaseTraining(nn.Module):
    """UNet and text encoder, and the denoising loss on plain captions."""

    def __init__(
        self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, schedule: Any, settings: DiffusionSettings
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.schedule, self.settings = schedule, settings
        self.table = {Drop.ALL: settings.drop_all + settings.drop_text}

    def forward(self, batch: DiffusionBatch, draws: SampleDraws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        drops = draw_drops(draws.uniform(), self.table).to(batch.latents.device)  # (B,)
        drops = torch.where(drops == Drop.ALL, drops, int(Drop.SUBJECTS))
        noisy = noised(self.schedule, batch, draws)
        prediction = self.predict(noisy.noisy, noisy.timesteps, drop_conditions(batch.inputs, drops))  # (B, C, h, w)
        loss = denoising_loss(
            self.schedule, prediction, noisy.latents, noisy.noise, noisy.timesteps, self.settings.snr_gamma,
            mask_weights(batch, self.settings.mask_weight),
        )  # fmt: skip
        return loss, band_metrics(self.schedule, prediction, noisy, self.settings.timestep_bands)

    def predict(self, noisy: Tensor, timesteps: Tensor, inputs: SubjectInputs) -> Tensor:
        context = self.text_encoder(inputs.input_ids).last_hidden_state  # (B, L, D)
        return self.unet(as_taken(noisy, self.unet), timesteps, context).sample  # (B, C, h, w)


@torch.no_grad()
def band_metrics(schedule: Any, prediction: Tensor, noisy: NoisyLatents, bands: int) -> dict[str, Tensor]:
    """The unweighted error by timestep, `denoising_t0` and so on."""
    errors = sample_errors(schedule, prediction, noisy.latents, noisy.noise, noisy.timesteps)  # (B,)
    return by_band("denoising", errors, noisy.timesteps, schedule.config.num_train_timesteps, bands)


def validation_loss(
    data: DiffusionData,
    schedule: Any,
    settings: DiffusionSettings,
    predict: Callable[[DiffusionBatch, NoisyLatents], Tensor],
) -> dict[str, float]:
    """`loss`, weighted as in training but for masks, and the unweighted `loss_t0` … by timestep, on unseen samples.

    Args:
        predict: the network's prediction for a batch, (B, C, h, w).
    """
    errors, timesteps = [], []
    for first in range(0, MEASURED, CHUNK):
        batch = data.validation_batch(first, CHUNK)
        noisy = noised_at(schedule, batch.latents, even_timesteps(schedule, first, CHUNK, MEASURED), first)
        prediction = predict(batch, noisy)
        errors.append(sample_errors(schedule, prediction, noisy.latents, noisy.noise, noisy.timesteps))
        timesteps.append(noisy.timesteps)
    every, times = torch.cat(errors), torch.cat(timesteps)  # (MEASURED,)
    steps = schedule.config.num_train_timesteps
    bands = by_band("loss", every, times, steps, settings.timestep_bands)
    loss = (every * snr_weights(schedule, times, settings.snr_gamma)).mean()
    return {name: float(value) for name, value in {"loss": loss, **bands}.items()}


class BaseTask:
    """`inputs`: vae and clip, or base, or none. `options`: see `DiffusionOptions`."""

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.options = settings_of(DiffusionOptions, settings.options, "options")
        sizes = load_model_settings(settings.model, settings.override)
        if {"vae", "base"} <= set(settings.inputs):
            raise UserError(
                f"inputs.vae={settings.inputs['vae']}, inputs.base={settings.inputs['base']}: a base starts from "
                "nothing with a vae, or goes on from another base; give a configuration with one of the two"
            )
        torch.manual_seed(settings.seed)
        start = _from_nothing(settings, sizes) if "vae" in settings.inputs else starting_base(settings, sizes)
        self.start = start
        with_placeholder = copy.deepcopy(start.tokenizer)
        add_placeholder(with_placeholder)
        self.data = DiffusionData(settings, start.vae, image_tower(settings, sizes), with_placeholder, device)
        self.dataset, self.loader_workers = self.data.dataset, self.data.loader_workers
        self.collate, self.batch = self.data.collate, self.data.batch
        self.keys, self.counts = self.data.keys, self.data.counts
        schedule = noise_schedule(start.scheduler)
        self.module = BaseTraining(start.unet, start.text_encoder, schedule, settings.diffusion).train()
        self.module.requires_grad_(True)
        apply_engine(settings.engine, start.unet, start.text_encoder)

    @torch.no_grad()
    def validate(self, picture: Path) -> dict[str, float]:
        metrics = validation_loss(self.data, self.module.schedule, self.settings.diffusion, self._predict)
        cells = []
        for first in range(0, SHOWN, CHUNK):
            real = self.data.draw(self.data.validation_batch(first, CHUNK).latents)  # (B, 3, H, W)
            cells += [list(pair) for pair in zip(real, self._draw(first, CHUNK), strict=True)]
        write_grid(cells, self.data.captions(0, SHOWN), picture)
        return metrics

    def _predict(self, batch: DiffusionBatch, noisy: NoisyLatents) -> Tensor:
        drops = torch.full((len(batch.latents),), int(Drop.SUBJECTS), device=self.device)
        with evaluation(self.settings.engine, self.device):
            return self.module.predict(noisy.noisy, noisy.timesteps, drop_conditions(batch.inputs, drops))

    def _draw(self, first: int, count: int) -> Tensor:
        """Pictures (B, 3, H, W) for the captions, by the stock pipeline with fixed seeds."""
        pipeline = self._pipeline(validation_sampler(self.module.schedule))
        pipeline.set_progress_bar_config(disable=True)
        with evaluation(self.settings.engine, self.device):
            latents = pipeline(
                self.data.captions(first, count),
                num_inference_steps=self.options.validation_steps,
                guidance_scale=self.options.validation_guidance,
                generator=[torch.Generator().manual_seed(first + row) for row in range(count)],
                height=self.settings.data.size,
                width=self.settings.data.size,
                output_type="latent",
            ).images
        return self.data.draw(latents.float())

    def _pipeline(self, scheduler: Any) -> StableDiffusionPipeline:
        start = self.start
        return StableDiffusionPipeline(
            vae=start.vae, text_encoder=start.text_encoder, tokenizer=start.tokenizer, unet=start.unet,
            scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def export(self, folder: Path) -> None:
        self._pipeline(self.start.scheduler).save_pretrained(folder)
        forget_origin(folder)


def validation_sampler(schedule: Any) -> DDIMScheduler:
    """A sampler without randomness of its own, good in few steps, for the noise levels that are trained."""
    return DDIMScheduler.from_config(schedule.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def _from_nothing(settings: TrainSettings, sizes: ModelSettings) -> StartingBase:
    """An untrained UNet beside the autoencoder of `inputs.vae` and the text tower of the CLIP of `inputs.clip`."""
    folder = input_folder(settings, "clip")
    with one_line_errors(f"inputs.clip={settings.inputs['clip']}", UserError):
        clip, config = load_open_clip(folder)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        text_encoder = convert_text_tower(clip, config["model_cfg"], tokenizer)
    with one_line_errors(f"inputs.vae={settings.inputs['vae']}", UserError):
        vae = AutoencoderKL.from_pretrained(input_folder(settings, "vae"), use_safetensors=True)
    for part in ("unet", "scheduler"):
        if part not in sizes.architecture:
            raise UserError(f"{settings.model}: architecture.{part}: missing; a base that starts from nothing needs it")
    unet = UNet2DConditionModel(**sizes.architecture["unet"])
    scheduler = DDIMScheduler(**sizes.architecture["scheduler"])
    return StartingBase(sizes.base, unet, text_encoder, tokenizer, vae, scheduler)
