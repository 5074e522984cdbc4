"""The subject model: adapters, keys and values, text encoder and projections trained on a base that otherwise stays.

Loss: denoising error under random condition dropout, plus the attention-map loss that ties each subject's supervised
tokens to its mask (Subject-Diffusion, arXiv 2307.11410, equations 4 and 6).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.errors import UserError
from data_pipeline.settings import settings_of
from model.attention_maps import AttentionMapRecorder, install_recording
from model.base_loading import one_line_errors
from model.composition import SubjectDiffusionModel
from model.image_encoder import SubjectImageEncoder
from model.inputs import Drop, SubjectInputs, draw_drops, drop_conditions
from model.losses import attention_map_loss
from model.prompt import add_placeholder
from model.sampling import denoise, initial_latents
from model.saving import LoadedParts, base_fingerprint, load_subject_model, save_subject_model
from model.subject_adapter import SubjectAdapter
from train.data.diffusion_batch import DiffusionBatch, draw_references
from train.data.diffusion_data import DiffusionData
from train.denoising import NoisyLatents, denoising_loss, mask_weights, noised, noised_at
from train.draws import SampleDraws
from train.inputs_folder import input_folder
from train.model_card import write_card
from train.network_options import apply_engine, as_taken, evaluation
from train.settings import DiffusionSettings, ModelSettings, TrainSettings, load_model_settings
from train.starting_models import StartingBase, image_tower, noise_schedule, starting_base
from train.tasks.base import (
    CHUNK,
    SHOWN,
    DiffusionOptions,
    band_metrics,
    validation_loss,
    validation_sampler,
)
from train.validation_grid import attention_by_mask, attention_overview, subject_tiles, write_grid


class SubjectTraining(nn.Module):
    """The subject model and its two losses. Parameters go by the names that patterns match: unet.…, adapter.…"""

    def __init__(self, model: SubjectDiffusionModel, schedule: Any, settings: DiffusionSettings) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.adapter = model.unet, model.text_encoder, model.adapter
        self.__dict__["model"] = model  # not registered a second time, under longer names
        self.model: SubjectDiffusionModel
        self.schedule, self.settings = schedule, settings
        self.table = {
            Drop.ALL: settings.drop_all,
            Drop.TEXT: settings.drop_text,
            Drop.LOCATION: settings.drop_location,
            Drop.SUBJECTS: settings.drop_subjects,
        }

    def forward(self, batch: DiffusionBatch, draws: SampleDraws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        settings = self.settings
        drops = draw_drops(draws.uniform(), self.table).to(batch.latents.device)  # (B,)
        inputs = drop_conditions(draw_references(batch, draws.shared), drops)
        noisy = noised(self.schedule, batch, draws)
        recorder = AttentionMapRecorder(batch.supervised) if settings.attention_loss_weight else None
        prediction = self.predict(noisy.noisy, noisy.timesteps, inputs, recorder)  # (B, C, h, w)
        error = denoising_loss(
            self.schedule, prediction, noisy.latents, noisy.noise, noisy.timesteps, settings.snr_gamma,
            mask_weights(batch, settings.mask_weight),
        )  # fmt: skip
        bands = band_metrics(self.schedule, prediction, noisy, settings.timestep_bands)
        metrics = {"denoising": error.detach(), **bands}
        if recorder is None:
            return error, metrics
        named = named_subjects(inputs)
        attention = attention_map_loss(recorder.maps, batch.masks, named, kind=settings.attention_loss_kind)
        # Rows that name no subject count as 0 in the loss and not at all in what is told.
        metrics["attention"] = attention.detach() * len(named) / named.any(dim=1).sum()
        return error + settings.attention_loss_weight * attention, metrics

    def predict(
        self, noisy: Tensor, timesteps: Tensor, inputs: SubjectInputs, recorder: AttentionMapRecorder | None = None
    ) -> Tensor:
        return self.model(as_taken(noisy, self.unet), timesteps, inputs, recorder=recorder)  # (B, C, h, w)


def named_subjects(inputs: SubjectInputs) -> Tensor:
    """(B, S) bool: subjects with supervised tokens; a row whose text was dropped has none left."""
    return inputs.subject_keep & (inputs.placeholder_positions >= 0)


def subject_model(
    start: StartingBase, encoder: SubjectImageEncoder, sizes: ModelSettings, settings: TrainSettings
) -> tuple[SubjectDiffusionModel, list[str]]:
    """The base with an adapter and, where attention is supervised, recording; and the names of what is trained.

    The adapter is new, or that of `inputs.subject`, whose trained parts of the base are taken over with it.

    Raises:
        UserError: a level or pattern of the model file that does not fit the base; another subject model that does not.
    """
    torch.manual_seed(settings.seed)
    earlier = _earlier_subject_model(settings, encoder) if "subject" in settings.inputs else None
    try:
        adapter = earlier.adapter if earlier else SubjectAdapter.from_unet(
            start.unet, text_dim=start.text_encoder.config.hidden_size, pooled_dim=encoder.pooled_dim,
            patch_dim=encoder.patch_dim, num_patches=encoder.num_patches, **sizes.adapter,
        )  # fmt: skip
        if settings.diffusion.attention_loss_weight:
            install_recording(start.unet)
        model = SubjectDiffusionModel(start.unet, start.text_encoder, adapter)
        trained = model.set_trainable(sizes.trained)
        if earlier:
            earlier.copy_into(start.unet, start.text_encoder)
    except (ValueError, TypeError) as error:
        raise UserError(f"{settings.model}: {' '.join(str(error).split())}") from error
    frozen = sorted(set(earlier.trained) - set(trained)) if earlier else []
    if frozen:
        raise UserError(
            f"inputs.subject={settings.inputs['subject']}: it trained {frozen[0]}, which {settings.model} leaves "
            "frozen; add a pattern to `trained`, else it would be lost at export"
        )
    return model, trained


def _earlier_subject_model(settings: TrainSettings, encoder: SubjectImageEncoder) -> LoadedParts:
    """The trained parts of `inputs.subject`; of the base they will be put on, only shapes must fit."""
    given = f"inputs.subject={settings.inputs['subject']}"
    if settings.override.adapter:
        keys = ", ".join(settings.override.adapter)
        raise UserError(f"override.adapter: {keys}: the adapter is that of {given}; leave one of them out")
    folder = input_folder(settings, "subject")
    with one_line_errors(given, UserError):
        parts = load_subject_model(folder, base="the base of this run")
    for key in ("pooled_dim", "patch_dim", "num_patches"):
        if parts.adapter.config[key] != getattr(encoder, key):
            raise UserError(
                f"{given}: its image encoder has {key} {parts.adapter.config[key]}, that of this run "
                f"{getattr(encoder, key)}; leave inputs.clip out, its own is then taken"
            )
    return parts


class SubjectTask:
    """`inputs`: base and clip, each or none; subject, to go on from. `options`: see `DiffusionOptions`."""

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.options = settings_of(DiffusionOptions, settings.options, "options")
        sizes = load_model_settings(settings.model, settings.override)
        start, encoder = starting_base(settings, sizes), image_tower(settings, sizes)
        self.base = start.name
        add_placeholder(start.tokenizer)
        self.model, self.trained = subject_model(start, encoder, sizes, settings)
        # Of the base as its files hold it; the engine may round what is frozen.
        self.fingerprint = base_fingerprint(start.unet, start.text_encoder, without=set(self.trained))
        apply_engine(settings.engine, start.unet, start.text_encoder)
        self.data = DiffusionData(settings, start.vae, encoder, start.tokenizer, device)
        self.encoder = encoder
        self.dataset, self.loader_workers = self.data.dataset, self.data.loader_workers
        self.collate, self.batch = self.data.collate, self.data.batch
        self.keys, self.counts = self.data.keys, self.data.counts
        self.module = SubjectTraining(self.model, noise_schedule(start.scheduler), settings.diffusion).train()

    @torch.no_grad()
    def validate(self, picture: Path) -> dict[str, float]:
        metrics = self._measure()
        cells = [row for first in range(0, SHOWN, CHUNK) for row in self._cells(first)]
        write_grid(cells, self.data.captions(0, SHOWN), picture)
        return metrics

    def _measure(self) -> dict[str, float]:
        schedule, settings = self.module.schedule, self.settings.diffusion
        attended: list[tuple[Tensor, Tensor]] = []

        def full(batch: DiffusionBatch, noisy: NoisyLatents) -> Tensor:
            recorder = AttentionMapRecorder(batch.supervised) if settings.attention_loss_weight else None
            prediction = self._predict(noisy, batch.inputs, recorder)
            if recorder is not None:
                overview = attention_overview(recorder.maps)
                attended.append(attention_by_mask(overview, batch.masks, named_subjects(batch.inputs)))
            return prediction

        def without(batch: DiffusionBatch, noisy: NoisyLatents) -> Tensor:
            return self._predict(noisy, _without_subjects(batch.inputs))

        metrics = validation_loss(self.data, schedule, settings, full)
        metrics["loss_without_subjects"] = validation_loss(self.data, schedule, settings, without)["loss"]
        metrics["gain"] = metrics["loss_without_subjects"] - metrics["loss"]
        if attended:
            inside, outside = (float(torch.stack(values).nanmean()) for values in zip(*attended, strict=True))
            metrics |= {"attention_inside": inside, "attention_outside": outside}
        return metrics

    def _cells(self, first: int) -> list[list[Tensor]]:
        """For each sample: the real picture, one drawn with and one without subjects, and the tiles of its subjects."""
        batch = self.data.validation_batch(first, CHUNK)
        real = self.data.draw(batch.latents)  # (B, 3, H, W)
        drawn = self._draw(batch.inputs, batch.latents.shape, first)
        plain = self._draw(_without_subjects(batch.inputs), batch.latents.shape, first)
        cells = [list(row) for row in zip(real, drawn, plain, strict=True)]
        if self.settings.diffusion.attention_loss_weight:
            recorder = AttentionMapRecorder(batch.supervised)
            schedule = self.module.schedule
            middle = torch.full((len(real),), schedule.config.num_train_timesteps // 2)
            noisy = noised_at(schedule, batch.latents, middle, first)
            self._predict(noisy, batch.inputs, recorder)
            overview = attention_overview(recorder.maps)  # (B, S, h, w)
            tiles = subject_tiles(real, overview, batch.masks, named_subjects(batch.inputs))
            cells = [row + of_subjects for row, of_subjects in zip(cells, tiles, strict=True)]
        return cells

    def _predict(
        self, noisy: NoisyLatents, inputs: SubjectInputs, recorder: AttentionMapRecorder | None = None
    ) -> Tensor:
        with evaluation(self.settings.engine, self.device):
            return self.module.predict(noisy.noisy, noisy.timesteps, inputs, recorder)

    def _draw(self, inputs: SubjectInputs, shape: torch.Size, first: int) -> Tensor:
        """Pictures (B, 3, H, W); a sample's starting noise is that of its number."""
        sampler, steps = validation_sampler(self.module.schedule), self.options.validation_steps
        generators = [torch.Generator().manual_seed(first + row) for row in range(shape[0])]
        latents = initial_latents(sampler, tuple(shape), steps=steps, generator=generators, device=self.device)
        with evaluation(self.settings.engine, self.device):
            latents = denoise(
                self.model, sampler, latents, inputs, steps=steps, text_scale=self.options.validation_guidance,
                guidance="joint",
            )  # fmt: skip
        return self.data.draw(latents)

    def export(self, folder: Path) -> None:
        count = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        card = write_card(self.settings, self.base, count, device)
        save_subject_model(
            folder, self.model, base=self.base, fingerprint=self.fingerprint, trained=self.trained, parts="trained",
            image_encoder=self.encoder, card=card,
        )  # fmt: skip


def _without_subjects(inputs: SubjectInputs) -> SubjectInputs:
    return drop_conditions(inputs, torch.full((len(inputs),), int(Drop.SUBJECTS), device=inputs.input_ids.device))
