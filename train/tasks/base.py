"""The base: a plain text-to-image model, stock UNet and the text tower of our CLIP, trained as Stable Diffusion is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from model.image_encoder import SubjectImageEncoder
from model.inputs import Drop, SubjectInputs, draw_drops, drop_conditions
from model.losses import diffusion_target, snr_weights
from model.open_clip_conversion import convert_text_tower, load_open_clip
from model.prompt import add_placeholder
from train.diffusion_batch import DiffusionBatch, diffusion_batch
from train.feature_cache import CachedScenes, EncodedScene, SceneEncoder
from train.inputs_folder import input_folder
from train.pictures import save_grid
from train.settings import DiffusionSettings, TrainSettings, load_model_settings


def noised(scheduler: DDIMScheduler, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random timesteps (B,), the noise, and the noisy latents, both shaped like `latents`."""
    count = scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, count, (len(latents),), generator=generator).to(latents.device)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    return timesteps, noise, scheduler.add_noise(latents, noise, timesteps)


def denoising_loss(
    scheduler: DDIMScheduler,
    prediction: Tensor,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    gamma: float | None,
    cell_weights: Tensor | None = None,
) -> Tensor:
    """Mean squared error, weighted by min-SNR-gamma and by place: scalar.

    Args:
        prediction, latents, noise: (B, C, h, w).
        timesteps: (B,).
        gamma: of min-SNR; None weighs every timestep the same.
        cell_weights: (B, 1, h, w) weight of each latent cell; None: 1.
    """
    error = (prediction.float() - diffusion_target(scheduler, latents, noise, timesteps)).square()  # (B, C, h, w)
    if cell_weights is not None:
        error = error * cell_weights
    return (error.flatten(1).mean(dim=1) * snr_weights(scheduler, timesteps, gamma)).mean()


class BaseTraining(nn.Module):
    """UNet and text encoder, and the denoising loss on plain captions."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        scheduler: DDIMScheduler,
        settings: DiffusionSettings,
    ) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.scheduler, self.settings = scheduler, settings

    def forward(self, batch: DiffusionBatch, generator: torch.Generator, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        shares = {Drop.ALL: self.settings.drop_all + self.settings.drop_text}
        drops = draw_drops(len(batch.latents), shares, generator).to(batch.latents.device)
        timesteps, noise, noisy = noised(self.scheduler, batch.latents, generator)
        drops = torch.where(drops == Drop.ALL, drops, int(Drop.SUBJECTS))
        prediction = self.predict(noisy, timesteps, drop_conditions(batch.inputs, drops))
        loss = denoising_loss(self.scheduler, prediction, batch.latents, noise, timesteps, self.settings.snr_gamma)
        return loss, {}

    def predict(self, noisy: Tensor, timesteps: Tensor, inputs: SubjectInputs) -> Tensor:
        context = self.text_encoder(inputs.input_ids).last_hidden_state  # (B, L, D)
        return self.unet(noisy, timesteps, context).sample  # (B, C, h, w)


class DiffusionData:
    """What the tasks base and subject share: frozen parts, cached scenes, a fixed validation batch."""

    def __init__(
        self, settings: TrainSettings, vae: AutoencoderKL, tokenizer: CLIPTokenizer, device: torch.device
    ) -> None:
        self.settings, self.device, self.vae, self.tokenizer = settings, device, vae, tokenizer
        clip, config = load_open_clip(input_folder(settings, "clip"))
        pixels = config["preprocess_cfg"]
        encoder = SubjectImageEncoder.from_open_clip(clip, config["model_cfg"], pixels["mean"], pixels["std"])
        self.image_encoder = encoder.eval().requires_grad_(False)
        vae.requires_grad_(False)
        same = settings.diffusion.reference == "same_image"
        scene_encoder = SceneEncoder(vae, self.image_encoder, device, same_image=same)
        caches = settings.folder.parent
        self.scenes = CachedScenes(settings.data, scene_encoder, caches)
        small = settings.data.model_copy(update={"cache_scenes": 64, "seed": settings.data.seed + 1})
        self.unseen = CachedScenes(small, scene_encoder, caches, split="val", shuffle=False)

    def collate(self, scenes: list[EncodedScene]) -> DiffusionBatch:
        return diffusion_batch(scenes, self.tokenizer, self.settings.diffusion.supervise, self.device)

    def validation_batch(self, first: int, count: int) -> DiffusionBatch:
        return self.collate([self.unseen[i] for i in range(first, first + count)])

    @torch.no_grad()
    def draw(self, latents: Tensor) -> Tensor:
        """Scaled latents (B, C, h, w) -> pictures (B, 3, H, W) in 0..1."""
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample / 2 + 0.5


class BaseTask:
    """`options`: none."""

    loader_workers = 0

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        architecture = load_model_settings(settings.model).architecture
        clip_folder = input_folder(settings, "clip")
        clip, config = load_open_clip(clip_folder)
        self.tokenizer = CLIPTokenizer.from_pretrained(clip_folder / "tokenizer")
        self.text_encoder: CLIPTextModel = convert_text_tower(clip, config["model_cfg"], self.tokenizer)
        torch.manual_seed(settings.seed)
        self.unet = UNet2DConditionModel(**architecture["unet"])
        self.scheduler = DDIMScheduler(**architecture["scheduler"])
        self.vae = AutoencoderKL.from_pretrained(input_folder(settings, "vae"))
        with_placeholder = CLIPTokenizer.from_pretrained(clip_folder / "tokenizer")
        add_placeholder(with_placeholder)
        self.data = DiffusionData(settings, self.vae, with_placeholder, device)
        self.dataset, self.collate = self.data.scenes, self.data.collate
        self.module = BaseTraining(self.unet, self.text_encoder, self.scheduler, settings.diffusion)

    @torch.no_grad()
    def validate(self, picture: Path) -> dict[str, float]:
        batch = self.data.validation_batch(0, 32)
        generator = torch.Generator().manual_seed(0)
        plain = torch.full((32,), int(Drop.SUBJECTS), device=self.data.device)
        timesteps, noise, noisy = noised(self.scheduler, batch.latents, generator)
        prediction = self.module.predict(noisy, timesteps, drop_conditions(batch.inputs, plain))
        gamma = self.module.settings.snr_gamma
        loss = denoising_loss(self.scheduler, prediction, batch.latents, noise, timesteps, gamma)
        pipeline = self._pipeline()
        pipeline.set_progress_bar_config(disable=True)
        captions = [self.data.unseen[i].caption for i in range(12)]
        drawn = pipeline(
            captions, num_inference_steps=25, guidance_scale=3.0, generator=generator, output_type="pt"
        ).images
        real = self.data.draw(batch.latents[:12])
        rows = [[x for i in (2 * y, 2 * y + 1) for x in (real[i], drawn[i])] for y in range(6)]
        both = [f"{captions[2 * y]} | {captions[2 * y + 1]}" for y in range(6)]
        save_grid(rows, picture, captions=both, scale=3)
        return {"loss": float(loss)}

    def _pipeline(self) -> Any:
        return StableDiffusionPipeline(
            vae=self.vae, text_encoder=self.text_encoder, tokenizer=self.tokenizer, unet=self.unet,
            scheduler=self.scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def export(self, folder: Path) -> None:
        self._pipeline().save_pretrained(folder)
