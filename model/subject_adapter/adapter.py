"""Everything that is added to a plain text-to-image model so that it draws given subjects, as one saved model.

`concepts` goes to the prompt (`text_fusion.py`), `condition` to the UNet; `composition.py` joins them. Concept fusion,
patch tokens with boxes in adapters, and the location mask: Subject-Diffusion, arXiv 2307.11410; adapters: GLIGEN, arXiv
2301.07093; concept renormalisation: InstantBooth, arXiv 2304.03411.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models import ModelMixin, UNet2DConditionModel
from torch import Tensor, nn

from model.inputs import SubjectInputs
from model.subject_adapter.attachment import Attachment, detach, transformer_blocks
from model.subject_adapter.condition import SubjectCondition
from model.subject_adapter.fuser import SubjectFuser
from model.subject_adapter.grounding import GroundingNetwork, Projection, fourier_box_features
from model.subject_adapter.location import LocationConvolution, location_mask
from model.subject_adapter.places import patch_boxes

Fusion = Literal["before", "after"]
ZeroStart = Literal["gates", "outputs"]


class SubjectAdapter(ModelMixin, ConfigMixin):
    """Concept projection, grounding network, fusers and location convolution.

    Build it with `from_unet`; without training it changes nothing but the placeholder's embedding.

    Args:
        blocks: path of each UNet block that carries a fuser -> `[dim, heads, head_dim]`.
        conv_in_channels: output channels of the UNet's `conv_in`.
        context_dim: width of the subject tokens.
        text_dim: width of the text encoder.
        pooled_dim, patch_dim, num_patches: of the image encoder; P, W and T of `SubjectInputs`.
        patch_tokens: False leaves out grounding network and fusers.
        cls_token: False puts the noun's own embedding where the concept goes.
        box_features: False gives every token the null box feature.
        patch_places: fusers look up each patch by where it would land in the picture (`places.py`), beside the
            published box feature. Off in the published model.
        location: False leaves out the location mask.
        fusion, fusion_scale: where the concept enters the text encoder, and the factor on it (`text_fusion.py`).
        only_inside_box: each subject's tokens are visible inside its box only.
        zero_start: what is 0 in an untrained fuser, so that it changes nothing: its `gates` (published), or its
            `outputs`, the last linear layers, with gates of 1. A gate near 0 changes its sign now and then and with it
            the direction in which everything behind it learns; open gates learn in far fewer samples.
    """

    @register_to_config
    def __init__(
        self,
        blocks: dict[str, Sequence[int]],
        conv_in_channels: int,
        context_dim: int,
        text_dim: int,
        pooled_dim: int,
        patch_dim: int,
        num_patches: int,
        patch_tokens: bool = True,
        cls_token: bool = True,
        box_features: bool = True,
        patch_places: bool = False,
        location: bool = True,
        fusion: Fusion = "before",
        fusion_scale: float = 1.0,
        only_inside_box: bool = False,
        zero_start: ZeroStart = "gates",
    ) -> None:
        super().__init__()
        if zero_start not in ("gates", "outputs"):
            raise ValueError(f"zero_start {zero_start!r}: expected 'gates' or 'outputs'")
        if fusion not in ("before", "after"):
            raise ValueError(f"fusion {fusion!r}: expected 'before' or 'after'")
        self.concept = Projection(pooled_dim, text_dim) if cls_token else None
        self.grounding = GroundingNetwork(patch_dim, context_dim) if patch_tokens else None
        self.fusers = nn.ModuleDict()
        for path, (dim, heads, head_dim) in (blocks if patch_tokens else {}).items():
            name = _fuser_name(path)
            self.fusers[name] = SubjectFuser(name, dim, context_dim, heads, head_dim, places=patch_places)
            if zero_start == "outputs":
                self.fusers[name].start_with_zero_outputs()
        self.location_convolution = LocationConvolution(conv_in_channels) if location else None

    @classmethod
    def from_unet(
        cls,
        unet: UNet2DConditionModel,
        *,
        text_dim: int,
        pooled_dim: int,
        patch_dim: int,
        num_patches: int,
        levels: Literal["all"] | Sequence[str] = "all",
        **options: Any,
    ) -> SubjectAdapter:
        """An untrained adapter for this UNet.

        Args:
            unet: plain UNet; not changed.
            levels: `all`, or the block groups that carry fusers, such as `down_blocks.1`, `mid_block`, `up_blocks.2`.
            options: ablations and options of the class.
        Raises:
            ValueError: a level without cross-attention.
        """
        blocks = transformer_blocks(unet)
        if levels != "all":
            for level in [levels] if isinstance(levels, str) else levels:
                if not any(path.startswith(f"{level}.") for path in blocks):
                    groups = sorted({path.split(".attentions")[0] for path in blocks})
                    raise ValueError(f"levels: {level!r} holds no cross-attention; expected 'all' or some of {groups}")
            chosen = tuple(f"{level}." for level in levels)
            blocks = {path: block for path, block in blocks.items() if path.startswith(chosen)}
        shapes = {
            path: [block.attn1.to_q.in_features, block.attn1.heads, block.attn1.inner_dim // block.attn1.heads]
            for path, block in blocks.items()
        }
        context_dim = next(iter(transformer_blocks(unet).values())).attn2.to_k.in_features
        # By keyword: arguments given by position are not written into what `from_config` reads.
        return cls(
            blocks=shapes,
            conv_in_channels=unet.conv_in.out_channels,
            context_dim=context_dim,
            text_dim=text_dim,
            pooled_dim=pooled_dim,
            patch_dim=patch_dim,
            num_patches=num_patches,
            **options,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[Any] | None, **kwargs: Any) -> Any:
        """As `ModelMixin.from_pretrained`; weights go the way of `load_state_dict`, which knows the gates' layout."""
        kwargs["low_cpu_mem_usage"] = False
        device = kwargs.pop("device_map", None)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        if device is not None:
            adapter = loaded[0] if isinstance(loaded, tuple) else loaded
            adapter.to(device[""] if isinstance(device, dict) else device)
        return loaded

    def attach(self, unet: UNet2DConditionModel) -> None:
        """Hook into a plain UNet, in place of an adapter that may be there already.

        Raises:
            ValueError: a UNet of another architecture, or one with grounding of its own.
        """
        blocks = transformer_blocks(unet)
        carrying = self.config["blocks"] if self.config["patch_tokens"] else {}
        for path, (expected, _, _) in carrying.items():
            dim = blocks[path].attn1.to_q.in_features if path in blocks else expected  # a lacking one is refused below
            if dim != expected:
                raise ValueError(f"subject adapter: block {path} has {dim} channels, it was made for {expected}")
        if unet.conv_in.out_channels != self.config["conv_in_channels"]:
            raise ValueError(
                f"subject adapter: the UNet's conv_in makes {unet.conv_in.out_channels} channels, "
                f"it was made for {self.config['conv_in_channels']}"
            )
        detach(unet)
        Attachment(unet, {path: self.fusers[_fuser_name(path)] for path in carrying}, self.location_convolution)

    def detach(self, unet: UNet2DConditionModel) -> None:
        """Make the UNet plain again."""
        detach(unet)

    def concepts(self, inputs: SubjectInputs, token_embedding: nn.Embedding) -> Tensor:
        """What stands in the prompt for each subject: w MLP(CLS) + (1 - w) noun embedding, w the strength.

        Args:
            inputs: conditions of B pictures with S subjects.
            token_embedding: of the text encoder.
        Returns:
            (B, S, text_dim); values of padding subjects are finite and used nowhere.
        """
        known = inputs.noun_ids >= 0  # (B, S, K)
        embedded = token_embedding(inputs.noun_ids.clamp(min=0)) * known[..., None]  # (B, S, K, text_dim)
        noun = embedded.sum(dim=2) / known.sum(dim=2, keepdim=True).clamp(min=1)  # (B, S, text_dim)
        if self.concept is None:
            return noun
        projected = self.concept(inputs.pooled.to(self.dtype))  # (B, S, text_dim)
        strength = inputs.strength[..., None].to(projected.dtype)  # (B, S, 1)
        return strength * projected + (1 - strength) * noun  # (B, S, text_dim)

    def condition(
        self,
        inputs: SubjectInputs,
        latent_size: tuple[int, int],
        beta: float = 1.0,
        skip_null_rows: bool = False,
    ) -> SubjectCondition:
        """What the UNet is told of the subjects of B pictures.

        Args:
            inputs: conditions with S subjects, R references each, T patches: N = S R T tokens. A subject of strength 0
                or without any reference is absent.
            latent_size: (h, w) of the latents.
            beta: factor on the fusers' residuals.
            skip_null_rows: fusers pass over rows without subjects (inference; in training every parameter must take
                part in every step).
        """
        present = inputs.subject_keep & (inputs.strength > 0) & inputs.reference_keep.any(dim=2)  # (B, S)
        located = present & inputs.location_keep[:, None]  # (B, S)
        tokens, keep = self._tokens(inputs, present, located)  # (B, N, D), (B, N)
        has_subjects = present.any(dim=1)  # (B,)
        rows = has_subjects.nonzero().flatten() if skip_null_rows else None  # (A,)
        rows = None if rows is not None and len(rows) == len(inputs) else rows
        location = location_mask(inputs.boxes, located if self.config["location"] else located & False, latent_size)
        per_subject = tokens.shape[1] // max(present.shape[1], 1)  # R T

        def of_tokens(values: Tensor) -> Tensor:  # (B, S, ...) -> (B, N, ...)
            return values.repeat_interleave(per_subject, dim=1)

        complete = bool((keep if rows is None else keep[rows]).all())
        as_trained = bool((inputs.strength[present] == 1).all())
        # Absent subjects are masked by `keep`; clamped because log 0 is not finite.
        log_strength = inputs.strength.float().clamp(min=1e-6).log().to(tokens.dtype)  # (B, S)
        whole = torch.tensor([0.0, 0.0, 1.0, 1.0], device=tokens.device)
        boxes = torch.where(located[..., None], inputs.boxes.float(), whole)  # (B, S, 4)
        return SubjectCondition(
            tokens=tokens,
            keep=None if complete else keep,
            factor=has_subjects.to(tokens.dtype),
            location=location.to(tokens.dtype),  # (B, 1, h, w)
            beta=beta,
            log_strength=None if as_trained else of_tokens(log_strength),
            token_places=self._places(inputs, located, latent_size)
            if self.config["patch_places"] and self.fusers
            else None,
            token_boxes=of_tokens(boxes) if self.config["only_inside_box"] else None,
            active_rows=rows,
        )

    def _tokens(self, inputs: SubjectInputs, present: Tensor, located: Tensor) -> tuple[Tensor, Tensor]:
        """Subject tokens (B, N, D), zero where they do not count, and which of them count (B, N)."""
        if self.grounding is None:
            empty = torch.zeros(len(inputs), 0, self.config["context_dim"], device=present.device, dtype=self.dtype)
            return empty, present[:, :0]
        box_keep = located if self.config["box_features"] else located & False  # (B, S)
        tokens = self.grounding(inputs.patches, inputs.boxes, box_keep)  # (B, S, R, T, D)
        keep = (present[..., None] & inputs.reference_keep)[..., None].expand(tokens.shape[:-1])  # (B, S, R, T)
        return tokens.masked_fill(~keep[..., None], 0).flatten(1, 3), keep.flatten(1)

    def _places(self, inputs: SubjectInputs, located: Tensor, latent_size: tuple[int, int]) -> Tensor:
        """Features of where every subject token lands, (B, N, 64); 0 where no place is known."""
        references, patches = inputs.patches.shape[2:4]
        boxes = patch_boxes(inputs.boxes.float(), patches, latent_size)  # (B, S, T, 4)
        features = fourier_box_features(boxes).to(self.dtype) * located[..., None, None]  # (B, S, T, 64)
        return features[:, :, None].expand(-1, -1, references, -1, -1).flatten(1, 3)

    def precompute(self, condition: SubjectCondition) -> SubjectCondition:
        """The same condition with keys and values of every fuser, which depend on neither image nor timestep."""
        rows = condition.active_rows
        tokens, places = condition.tokens, condition.token_places
        if rows is not None:
            tokens, places = tokens[rows], None if places is None else places[rows]  # (A, N, D), (A, N, 64)
        cached = {fuser.name: fuser.keys_values(tokens, places) for fuser in self._fusers()}
        return replace(condition, key_values=cached)

    def _fusers(self) -> Iterator[SubjectFuser]:
        for fuser in self.fusers.values():
            assert isinstance(fuser, SubjectFuser)
            yield fuser


def _fuser_name(block_path: str) -> str:
    """The name of a module cannot hold a dot."""
    return block_path.replace(".", "-")
