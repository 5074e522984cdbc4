"""The diffusers pipeline of Subject Diffusion: references and a prompt in, pictures out, no tuning.

    pipeline = SubjectDiffusionPipeline.from_pretrained("toybox")
    pipeline("a dog on the beach", [Subject("dog", [cutout])], generator=torch.Generator().manual_seed(0)).images[0]

A call checks its inputs, encodes subjects and prompt (`conditions.py`), sets timesteps and latents, denoises
(`model/sampling.py`) and decodes. Subject-Diffusion, arXiv 2307.11410; guidance: InstructPix2Pix, arXiv 2211.09800.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from data_pipeline.errors import UserError
from infer.call_checks import (
    check_choice,
    check_counts,
    check_scales,
    check_shares,
    check_size,
    check_subjects,
    one_each,
    subjects_each,
)
from infer.conditions import PictureRequest, ReferenceFeatures, build_inputs
from infer.layout import place_subjects
from infer.loading import load_base, load_base_networks, load_trained_parts, locate_model, one_line_errors
from infer.subjects import Box, Subject, with_mentioned
from model.composition import SubjectDiffusionModel
from model.image_encoder import SubjectImageEncoder
from model.learned_words import LearnedWords
from model.prompt import add_placeholder
from model.sampling import denoise, initial_latents
from model.saving import MANIFEST, base_fingerprint
from model.subject_adapter import SubjectAdapter

Guidance = Literal["separate", "joint", "none"]
Layout = Literal["seeded", "none"]
StepCallback = Callable[["SubjectDiffusionPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
Generators: TypeAlias = "torch.Generator | list[torch.Generator] | None"


@dataclass
class SubjectDiffusionPipelineOutput(BaseOutput):
    """Pictures, and where their subjects were asked to stand."""

    images: list[Image.Image] | np.ndarray | Tensor  # list of PIL; (B, H, W, 3) 0..1; (B, 3, H, W) 0..1; or latents
    boxes: list[list[Box] | None]  # a picture: boxes in the order of its subjects, then of the pipeline's references
    # that its prompt names; None where the model chose


class SubjectDiffusionPipeline(DiffusionPipeline):
    """Draws subjects from references.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: as in Stable Diffusion.
        adapter: grounding network, fusers and location convolution; attached to `unet`, whose own weights stay stock.
        image_encoder: looks at the references; None with `adapter` None: a plain base, for refined words only.
        base_unet, base_text_encoder: the plain base, for `subject_until` < 1; loaded when first needed.
        base: name, folder or hub id of the plain base.

    `words` holds refined words; prompts name them by their placeholders, beside subjects from references. Those of
    `references` are drawn as subjects too, wherever a prompt names them.
    """

    model_cpu_offload_seq = "image_encoder->unet->vae"
    # These are used part by part and not through `forward`, so offload hooks would not see them; both are small.
    _exclude_from_cpu_offload = ["text_encoder", "base_text_encoder", "adapter"]
    _optional_components = ["base_unet", "base_text_encoder", "adapter", "image_encoder"]
    _callback_tensor_inputs = ["latents"]
    base_unet: UNet2DConditionModel | None
    base_text_encoder: CLIPTextModel | None

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        adapter: SubjectAdapter | None,
        image_encoder: SubjectImageEncoder | None,
        base_unet: UNet2DConditionModel | None = None,
        base_text_encoder: CLIPTextModel | None = None,
        base: str | None = None,
    ) -> None:
        super().__init__()
        add_placeholder(tokenizer)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            adapter=adapter,
            image_encoder=image_encoder,
            base_unet=base_unet,
            base_text_encoder=base_text_encoder,
        )
        self.register_to_config(base=base)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.reference_features = ReferenceFeatures()
        self.installed: tuple[str, ...] = ()  # digests of the refinements that are put to use
        self.references: tuple[Subject, ...] = ()  # shown beside refined words that were learnt so
        self._subject_model: SubjectDiffusionModel | None = None

    @classmethod
    def from_pretrained(cls, name: str | Path, base: str | None = None, **kwargs: Any) -> SubjectDiffusionPipeline:
        """Load a shipped model by name (`toybox`), a folder of trained parts, a full diffusers folder, or a hub id.

        Args:
            name: what to load.
            base: for trained parts, another base than the one they name (its shapes must fit).
            kwargs: as for `DiffusionPipeline.from_pretrained`, among them `dtype` (fp32 if not given) and components.
        Raises:
            UserError: no such model, or not a model of this kind.
        """
        place = locate_model(name)
        # The libraries' own defaults differ: transformers keeps a file's fp16, diffusers loads fp32.
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or torch.float32
        if isinstance(place, Path) and (place / MANIFEST).exists():
            return cls(**{**load_trained_parts(place, base, dtype), **kwargs})
        if base is not None:
            kwargs["base"] = base
        with one_line_errors(f"model {name}"):
            return super().from_pretrained(place, **{"use_safetensors": True, "dtype": dtype, **kwargs})

    @classmethod
    def from_plain_base(cls, name: str | Path, dtype: torch.dtype = torch.float32) -> SubjectDiffusionPipeline:
        """A plain base, by its own name or that of a subject model on it: it draws refined words, but no photos.

        Raises:
            UserError: it cannot be found or read.
        """
        stock = load_base(name, dtype)
        return cls(
            vae=stock.vae, text_encoder=stock.text_encoder, tokenizer=stock.tokenizer, unet=stock.unet,
            scheduler=stock.scheduler, adapter=None, image_encoder=None, base=str(name),
        )  # fmt: skip

    @property
    def subject_model(self) -> SubjectDiffusionModel:
        """UNet, text encoder, adapter and words as one module; follows a component that was replaced."""
        known = self._subject_model
        if known is None or (known.unet, known.text_encoder, known.adapter) != (
            self.unet,
            self.text_encoder,
            self.adapter,
        ):
            words = self.words
            self._subject_model = SubjectDiffusionModel(self.unet, self.text_encoder, self.adapter)
            self._subject_model.words = words
        assert self._subject_model is not None
        return self._subject_model

    @property
    def words(self) -> LearnedWords | None:
        """Refined words of the `subject_model`."""
        return None if self._subject_model is None else self._subject_model.words

    @words.setter
    def words(self, words: LearnedWords | None) -> None:
        self.subject_model.words = words

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        subjects: Sequence[Subject] | Sequence[Sequence[Subject]] | None = None,
        *,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        subject_guidance_scale: float = 1.5,
        guidance: Guidance = "separate",
        beta: float = 1.0,
        subject_start: float = 0.0,
        subject_end: float = 1.0,
        subject_until: float = 1.0,
        layout: Layout = "seeded",
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> SubjectDiffusionPipelineOutput | tuple[Any, ...]:
        """Draw pictures.

        Args:
            prompt: one or several; each subject's noun must stand in it.
            subjects: what to draw from references, for all prompts alike or one list a prompt; None: plain
                text-to-image.
            negative_prompt: what to stay away from; one for all prompts or one each.
            height, width: pixels, multiples of the VAE's factor; None: the size the model was trained at.
            num_inference_steps: denoising steps.
            guidance_scale, subject_guidance_scale: s_t and s_i in eps_u + s_i (eps_i - eps_u) + s_t (eps_t - eps_i).
            guidance: `separate` has three branches, `joint` two (s_i unused), `none` one.
            beta: scale of the adapter's residuals; 0 leaves only the text and the location to speak.
            subject_start, subject_end: shares of the steps between which the subjects are drawn.
            subject_until: share of the steps after which the plain base takes over.
            layout: places of subjects without a box: `seeded` throws boxes that do not overlap, `none` leaves the
                places to the model (then no subject may have a box).
            num_images_per_prompt: pictures of each prompt.
            eta: of DDIM-like schedulers.
            generator: one for the batch, or one a picture (a picture is then the same whatever the batch).
            latents: (B, C, h, w) standard normal noise to start from, instead of the generator's.
            output_type: `pil`, `np` (B, H, W, 3), `pt` (B, 3, H, W), both 0..1, or `latent`.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": …}); may return new ones.
        Returns:
            `SubjectDiffusionPipelineOutput`, or the tuple (images, boxes).
        Raises:
            UserError: an argument that cannot work, named in one line.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = one_each(negative_prompt or "", len(prompts), "negative_prompt")
        given = subjects_each(subjects, len(prompts))
        groups = [with_mentioned(text, group, self.references) for text, group in zip(prompts, given, strict=True)]
        height, width = height or self._trained_size()[0], width or self._trained_size()[1]
        check_size(height, width, self.vae_scale_factor)
        check_choice("guidance", guidance, ("separate", "joint", "none"))
        check_choice("layout", layout, ("seeded", "none"))
        check_choice("output_type", output_type, ("pil", "np", "pt", "latent"))
        check_counts(len(prompts), num_images_per_prompt, num_inference_steps)
        check_scales(guidance_scale=guidance_scale, subject_guidance_scale=subject_guidance_scale, beta=beta)
        check_shares(subject_start, subject_end, subject_until)
        check_subjects(prompts, groups, layout)
        for name in callback_on_step_end_tensor_inputs:
            check_choice("callback_on_step_end_tensor_inputs", name, tuple(self._callback_tensor_inputs))

        rows = [index for index in range(len(prompts)) for _ in range(num_images_per_prompt)]
        seeds = _layout_seeds(generator, len(rows))
        boxes = [
            place_subjects(groups[row], seed, height / width) if groups[row] and layout == "seeded" else None
            for row, seed in zip(rows, seeds, strict=True)
        ]
        requests = [
            PictureRequest(prompts[row], negatives[row], tuple(groups[row]), None if placed is None else tuple(placed))
            for row, placed in zip(rows, boxes, strict=True)
        ]
        device = self._execution_device
        inputs = build_inputs(requests, self.tokenizer, self.image_encoder, self.reference_features, self.words).to(
            device
        )
        if self.words is not None:
            self.words.to(device)
        plain = self._plain_base() if subject_until < 1 else None
        start = self.prepare_latents(len(rows), height, width, num_inference_steps, generator, latents)

        with self.progress_bar(total=num_inference_steps) as progress:

            def on_step(index: int, timestep: Tensor, current: Tensor) -> Tensor | None:
                progress.update()
                if callback_on_step_end is None:
                    return None
                return (callback_on_step_end(self, index, timestep, {"latents": current}) or {}).get("latents")

            drawn = denoise(
                self.subject_model,
                self.scheduler,
                start,
                inputs,
                steps=num_inference_steps,
                text_scale=guidance_scale,
                subject_scale=subject_guidance_scale,
                guidance=guidance,
                beta=beta,
                subject_range=(subject_start, subject_end),
                plain=plain,
                subject_until=subject_until,
                eta=eta,
                generator=generator,
                on_step=on_step,
            )  # (B, C, h, w)
        images = drawn if output_type == "latent" else self.decode_latents(drawn, output_type)
        self.maybe_free_model_hooks()
        return SubjectDiffusionPipelineOutput(images, boxes) if return_dict else (images, boxes)

    def prepare_latents(
        self, rows: int, height: int, width: int, steps: int, generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """Noise at the first level, (rows, C, height ÷ factor, width ÷ factor) float32."""
        channels = self.unet.config.out_channels
        shape = (rows, channels, height // self.vae_scale_factor, width // self.vae_scale_factor)
        if latents is None:
            return initial_latents(
                self.scheduler, shape, steps=steps, generator=generator, device=self._execution_device
            )
        if tuple(latents.shape) != shape:
            raise UserError(f"latents: shape {tuple(latents.shape)}; expected {shape}")
        self.scheduler.set_timesteps(steps, device=self._execution_device)
        return latents.to(self._execution_device, torch.float32) * self.scheduler.init_noise_sigma

    def decode_latents(self, latents: Tensor, output_type: str) -> Any:
        """Latents (B, C, h, w) as the UNet sees them -> pictures of `output_type`."""
        scaled = latents / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0.0)
        pixels = self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0]  # (B, 3, H, W) -1..1
        return self.image_processor.postprocess(pixels.float(), output_type=output_type)

    def fingerprint(self) -> str:
        """64 hexadecimal digits that tell the weights apart: UNet, text encoder, adapter and words."""
        digest = hashlib.sha256(base_fingerprint(self.unet, self.text_encoder).encode())
        for part in (self.adapter, self.words):
            if part is not None:
                digest.update(base_fingerprint(part, self.text_encoder).encode())
        digest.update("".join(self.installed).encode())
        return digest.hexdigest()

    def _plain_base(self) -> tuple[UNet2DConditionModel, CLIPTextModel]:
        if self.base_unet is None or self.base_text_encoder is None:
            if self.config.base is None:
                raise UserError("subject_until below 1 needs the plain base; load the pipeline with base=NAME")
            unet, text_encoder = load_base_networks(self.config.base, self.unet.dtype)
            self.base_unet = unet.to(self._execution_device)
            self.base_text_encoder = text_encoder.to(self._execution_device)
        return self.base_unet, self.base_text_encoder

    def _trained_size(self) -> tuple[int, int]:
        size = self.unet.config.sample_size
        rows, columns = (size, size) if isinstance(size, int) else size
        return rows * self.vae_scale_factor, columns * self.vae_scale_factor


def _layout_seeds(generator: Generators, rows: int) -> list[int]:
    """One seed a picture, tied to its generator; without one drawn from torch's global state."""
    if generator is None:
        return torch.randint(2**31, (rows,)).tolist()
    if isinstance(generator, list):
        if len(generator) != rows:
            raise UserError(f"generator: {len(generator)} generators for {rows} pictures; give one, or one a picture")
        return [one.initial_seed() for one in generator]
    return [generator.initial_seed() + row for row in range(rows)]
