"""The networks of a run and one forward pass of its training, without weights: what the dry run measures.

Built on whatever device is current (`with torch.device("meta")`), from the model file alone. The pass is that of
train/tasks/subject.py and base.py from finished batches on; what looks at values to save work (padding, strength) is
left out: it is the fullest batch that is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from data_pipeline.errors import UserError
from model.attention_maps import AttentionMapRecorder, install_recording
from model.composition import SubjectDiffusionModel
from model.image_encoder import SubjectImageEncoder
from model.inputs import SubjectInputs
from model.losses import attention_map_loss
from model.subject_adapter import SubjectAdapter, SubjectCondition
from model.subject_adapter.grounding import BOX_FEATURES
from model.text_fusion import encode_prompt
from train.settings import ModelSettings, TrainSettings, load_model_settings

NOUN_TOKENS = 4  # of a subject's noun


class PlainModel(nn.Module):
    """UNet and text encoder of task base."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder


@dataclass(frozen=True)
class Networks:
    """All networks of a run."""

    trainable: SubjectDiffusionModel | PlainModel  # holds all that is trained, and what is frozen of the same networks
    trained: list[str]  # names of the trained parameters
    patterns: tuple[str, ...]  # which chose them
    vae: AutoencoderKL
    image_encoder: SubjectImageEncoder | None  # None: task base has no references

    def checkpoint_activations(self, parts: Sequence[str]) -> None:
        """Recompute instead of keep, in the parts named; in the others not."""
        if "unet" in parts:
            self.trainable.unet.enable_gradient_checkpointing()
        else:
            self.trainable.unet.disable_gradient_checkpointing()
        if "text_encoder" in parts:
            self.trainable.text_encoder.activation_checkpointing_enable()
        else:
            self.trainable.text_encoder.activation_checkpointing_disable()


@dataclass(frozen=True)
class BatchShape:
    """What the samples of the fullest batch hold."""

    latent_side: int
    channels: int  # of the latents
    subjects: int
    references: int  # of each subject


def build_networks(settings: TrainSettings) -> Networks:
    """The networks that the run's model file describes.

    Raises:
        UserError: a task that has no plan, a model file without a part, a pattern that matches nothing.
    """
    if settings.task not in ("base", "subject"):
        raise UserError(f"task={settings.task}: --dry-run plans the tasks base and subject; leave it out for this one")
    sizes = load_model_settings(settings.model, settings.override)
    unet = UNet2DConditionModel(**_section(settings, sizes, "unet"))
    text_encoder = CLIPTextModel(_text_config(settings, sizes))
    vae = AutoencoderKL(**_section(settings, sizes, "vae")).eval().requires_grad_(False)
    if settings.task == "base":
        plain = PlainModel(unet, text_encoder).train()
        return Networks(plain, [name for name, _ in plain.named_parameters()], (".*",), vae, None)
    encoder = _image_encoder(settings, sizes).eval().requires_grad_(False)
    adapter = SubjectAdapter.from_unet(
        unet, text_dim=text_encoder.config.hidden_size, pooled_dim=encoder.pooled_dim, patch_dim=encoder.patch_dim,
        num_patches=encoder.num_patches, **sizes.adapter,
    )  # fmt: skip
    if settings.diffusion.attention_loss_weight:
        install_recording(unet)
    model = SubjectDiffusionModel(unet, text_encoder, adapter).train()
    try:
        trained = model.set_trainable(sizes.trained)
    except ValueError as error:
        raise UserError(f"{settings.model}: {error}") from error
    return Networks(model, trained, sizes.trained, vae, encoder)


def batch_shape(settings: TrainSettings, networks: Networks) -> BatchShape:
    """Of the fullest batch that the settings allow."""
    data = settings.data
    side = data.size // 2 ** (len(networks.vae.config.block_out_channels) - 1)
    channels = networks.vae.config.latent_channels
    if networks.image_encoder is None:
        return BatchShape(side, channels, 0, 0)
    with_toybox = not data.shards if data.toybox.weight is None else data.toybox.weight > 0
    most = max([data.max_subjects] * bool(data.shards) + [data.toybox.max_subjects] * with_toybox)
    references = max([data.references.most] * bool(data.shards) + [data.toybox.references[1]] * with_toybox)
    # Task subject's module takes part in every step, with one subject's padding at least.
    return BatchShape(side, channels, max(1, most), 1 if data.references.source == "same_image" else references)


def training_loss(networks: Networks, settings: TrainSettings, batch_size: int) -> Tensor:
    """Forward pass of one batch on the current device; the scalar that is differentiated."""
    shape = batch_shape(settings, networks)
    latents = torch.empty(batch_size, shape.channels, shape.latent_side, shape.latent_side)
    timesteps = torch.zeros(batch_size, dtype=torch.int64)
    model = networks.trainable
    if isinstance(model, PlainModel):
        ids = torch.zeros(batch_size, model.text_encoder.config.max_position_embeddings, dtype=torch.int64)
        context = encode_prompt(model.text_encoder, ids, None, ids)  # (B, L, D)
        prediction = model.unet(latents, timesteps, context, return_dict=False)[0]  # (B, C, h, w)
        return (prediction.float() - latents).square().mean()
    recorder, attention = None, {}
    if settings.diffusion.attention_loss_weight:
        length = model.text_encoder.config.max_position_embeddings
        recorder = AttentionMapRecorder(torch.zeros(batch_size, shape.subjects, length))
        attention = {"recorder": recorder}
    context, condition = _encode(model, shape, batch_size)
    prediction = model.denoise(latents, timesteps, context, condition, cross_attention_kwargs=attention)  # (B, C, h, w)
    loss = (prediction.float() - latents).square().mean()
    if recorder is None:
        return loss
    masks = torch.zeros(batch_size, shape.subjects, shape.latent_side, shape.latent_side)
    keep = torch.ones(batch_size, shape.subjects, dtype=torch.bool)
    kind = settings.diffusion.attention_loss_kind
    return loss + settings.diffusion.attention_loss_weight * attention_map_loss(recorder.maps, masks, keep, kind=kind)


def _encode(model: SubjectDiffusionModel, shape: BatchShape, rows: int) -> tuple[Tensor, SubjectCondition]:
    """`SubjectDiffusionModel.encode` of a full batch, without a look at the values of its masks."""
    adapter, text_encoder = model.adapter, model.text_encoder
    assert adapter is not None, "build_networks gives task subject one"
    config = adapter.config
    inputs = _inputs(config, text_encoder.config.max_position_embeddings, shape, rows)
    context = encode_prompt(
        text_encoder, inputs.input_ids, adapter.concepts(inputs, text_encoder.embeddings.token_embedding),
        inputs.placeholder_positions, fusion=config["fusion"], scale=config["fusion_scale"],
    )  # fmt: skip
    if adapter.grounding is None:
        tokens = torch.empty(rows, 0, config["context_dim"])
    else:
        tokens = adapter.grounding(inputs.patches, inputs.boxes, inputs.subject_keep).flatten(1, 3)  # (B, N, D)
    count = tokens.shape[1]
    condition = SubjectCondition(
        tokens=tokens,
        keep=torch.ones(rows, count, dtype=torch.bool),
        factor=torch.ones(rows, dtype=tokens.dtype),
        location=torch.zeros(rows, 1, shape.latent_side, shape.latent_side, dtype=tokens.dtype),
        token_places=torch.zeros(rows, count, BOX_FEATURES) if config["patch_places"] else None,
        token_boxes=torch.zeros(rows, count, 4) if config["only_inside_box"] else None,
    )
    return context, condition


def _inputs(config: Mapping[str, Any], length: int, shape: BatchShape, rows: int) -> SubjectInputs:
    subjects = shape.subjects
    ids = torch.zeros(rows, length, dtype=torch.int64)
    return SubjectInputs(
        input_ids=ids,
        plain_input_ids=ids,
        empty_input_ids=ids,
        placeholder_positions=torch.zeros(rows, subjects, dtype=torch.int64),
        noun_ids=torch.zeros(rows, subjects, NOUN_TOKENS, dtype=torch.int64),
        pooled=torch.empty(rows, subjects, config["pooled_dim"]),
        patches=torch.empty(rows, subjects, shape.references, config["num_patches"], config["patch_dim"]),
        reference_keep=torch.ones(rows, subjects, shape.references, dtype=torch.bool),
        subject_keep=torch.ones(rows, subjects, dtype=torch.bool),
        boxes=torch.zeros(rows, subjects, 4),
        location_keep=torch.ones(rows, dtype=torch.bool),
        strength=torch.ones(rows, subjects),
    )


def _section(settings: TrainSettings, sizes: ModelSettings, part: str) -> dict[str, Any]:
    if part not in sizes.architecture:
        raise UserError(f"{settings.model}: architecture.{part} is missing; --dry-run builds all networks from it")
    return sizes.architecture[part]


def _text_config(settings: TrainSettings, sizes: ModelSettings) -> CLIPTextConfig:
    """The file's own text encoder, or the text tower of its CLIP."""
    if "text_encoder" in sizes.architecture:
        return CLIPTextConfig(**sizes.architecture["text_encoder"])
    clip = _section(settings, sizes, "clip")
    text = clip["text_cfg"]
    return CLIPTextConfig(
        vocab_size=text["vocab_size"],
        hidden_size=text["width"],
        intermediate_size=4 * text["width"],
        num_hidden_layers=text["layers"],
        num_attention_heads=text["heads"],
        max_position_embeddings=text["context_length"],
        projection_dim=clip["embed_dim"],
    )


def _image_encoder(settings: TrainSettings, sizes: ModelSettings) -> SubjectImageEncoder:
    """The image tower by its open_clip name, or that of the file's CLIP."""
    if sizes.image_encoder is None:
        config = _section(settings, sizes, "clip")
    else:
        name = sizes.image_encoder["name"]
        config = open_clip.get_model_config(name)
        if config is None:
            raise UserError(f"{settings.model}: image_encoder.name={name}: open_clip has no model of that name")
    return SubjectImageEncoder(config["embed_dim"], config["vision_cfg"], bool(config.get("quick_gelu")))
