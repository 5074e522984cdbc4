"""UNet, text encoder and subject adapter as the one network that is trained and drawn with.

`encode` turns `SubjectInputs` into what the UNet is conditioned on, `denoise` runs the UNet; the trainer calls
`forward`, `sampling.denoise` the two by themselves. Subject-Diffusion, arXiv 2307.11410.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from diffusers.models import UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

from model.attention_maps import AttentionMapRecorder, cross_attention_layers, install_layer_contexts
from model.inputs import SubjectInputs
from model.layer_contexts import LayerContexts, encode_layer_contexts
from model.learned_words import LearnedWords
from model.subject_adapter import SubjectAdapter, SubjectCondition
from model.text_fusion import PromptEmbeddings, WordRows, embed_prompt, encode_embeddings


class SubjectDiffusionModel(nn.Module):
    """A stock base with the adapter attached, and learned words where there are any.

    Args:
        unet: plain UNet; the adapter hooks into it, its own parameters stay as they are.
        text_encoder: stock CLIP text model.
        adapter: made for this UNet; None: a plain base, which draws no subjects from references.

    `words` may be set and taken away at any time; its parameters are the model's while it is there.
    """

    words: LearnedWords | None

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, adapter: SubjectAdapter | None) -> None:
        super().__init__()
        self.words = None
        self.unet, self.text_encoder, self.adapter = unet, text_encoder, adapter
        if adapter is None:
            return
        if text_encoder.config.hidden_size != adapter.config["text_dim"]:
            raise ValueError(
                f"subject adapter: the text encoder is {text_encoder.config.hidden_size} wide, "
                f"the adapter was made for {adapter.config['text_dim']}"
            )
        adapter.attach(unet)

    def encode(
        self,
        inputs: SubjectInputs,
        latent_size: tuple[int, int],
        beta: float = 1.0,
        inference: bool = False,
        valid: Tensor | None = None,
        adaptive_factor: Tensor | None = None,
    ) -> tuple[Tensor, SubjectCondition]:
        """Text and subjects of B pictures, as the UNet takes them.

        Args:
            inputs: conditions with S subjects; S may be 0.
            latent_size: (h, w) of the latents.
            beta: factor on the adapter's residuals.
            inference: compute the fusers' keys and values now, and let them skip rows without subjects.
            valid, adaptive_factor: for adaptive words, as in `layer_contexts.encode_layer_contexts`.
        Returns:
            context (B, L, D) and the condition of the same B rows.
        """
        adapter = self.adapter
        words = self.words
        rows = None if words is None else words.word_rows(None if words.num_layers is None else 0)
        embedded = self.embed(inputs, rows)
        context, layer_contexts = None, None
        if words is not None and words.num_layers is not None and bool(words.holds_layerwise(inputs.input_ids).any()):
            layer_contexts = self._layer_contexts(words, inputs, embedded, valid, adaptive_factor)
            context = layer_contexts.plain
        else:
            context = encode_embeddings(self.text_encoder, embedded)  # (B, L, D)
        if adapter is None:
            condition = _no_subjects(context, latent_size)
        else:
            condition = adapter.condition(inputs, latent_size, beta=beta, skip_null_rows=inference)
            condition = adapter.precompute(condition) if inference else condition
        condition.layer_contexts = layer_contexts
        return context, condition

    def embed(self, inputs: SubjectInputs, words: WordRows | None) -> PromptEmbeddings:
        """Prompts with concepts and these words in their places, as `encode` has them; of layerwise words one layer."""
        if self.adapter is None:
            if bool(inputs.subject_keep.any()):
                raise ValueError("this model has no subject adapter and draws no subjects from references")
            return embed_prompt(self.text_encoder, inputs.input_ids, None, inputs.placeholder_positions, words=words)
        config = self.adapter.config
        return embed_prompt(
            self.text_encoder,
            inputs.input_ids,
            self.adapter.concepts(inputs, self.text_encoder.embeddings.token_embedding),  # (B, S, D)
            inputs.placeholder_positions,
            fusion=config["fusion"],
            scale=config["fusion_scale"],
            words=words,
        )

    def _layer_contexts(
        self,
        words: LearnedWords,
        inputs: SubjectInputs,
        embedded: PromptEmbeddings,
        valid: Tensor | None,
        adaptive_factor: Tensor | None,
    ) -> LayerContexts:
        layers = [self.unet.get_submodule(name) for name in cross_attention_layers(self.unet)]
        if len(layers) != words.num_layers:
            raise ValueError(
                f"learned words: made for {words.num_layers} cross-attention layers, this UNet has {len(layers)}"
            )
        install_layer_contexts(self.unet)
        return encode_layer_contexts(
            self.text_encoder,
            words,
            layers,
            inputs.input_ids,
            embedded,
            valid=valid,
            adaptive_factor=adaptive_factor,
        )

    def denoise(
        self,
        latents: Tensor,
        timesteps: Tensor,
        context: Tensor,
        condition: SubjectCondition,
        **kwargs: Any,
    ) -> Tensor:
        """The UNet's prediction.

        Args:
            latents: (B, C, h, w), scaled for the timestep.
            timesteps: (B,) or scalar.
            context: (B, L, D) from `encode`.
            condition: from `encode`.
            kwargs: further arguments of the stock UNet; `cross_attention_kwargs` are kept beside the condition.
        Returns:
            (B, C, h, w).
        """
        attention = dict(kwargs.pop("cross_attention_kwargs", None) or {})
        if self.adapter is not None:
            attention["gligen"] = {"objs": condition}
        contexts = condition.layer_contexts
        if contexts is not None and contexts.adaptive is not None:
            contexts = contexts.at(self.unet.time_embedding(self.unet.get_time_embed(latents, timesteps)))  # as it does
        if contexts is not None:
            attention["layer_contexts"] = contexts
        return self.unet(
            latents,
            timesteps,
            encoder_hidden_states=context,
            return_dict=False,
            **({"cross_attention_kwargs": attention} if attention else {}),
            **kwargs,
        )[0]  # (B, C, h, w)

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        inputs: SubjectInputs,
        recorder: AttentionMapRecorder | None = None,
    ) -> Tensor:
        """One training pass: (B, C, h, w) noisy latents and (B,) timesteps -> prediction (B, C, h, w).

        A recorder needs `attention_maps.install_recording(unet)`; read its maps before `backward`.
        """
        context, condition = self.encode(inputs, (noisy_latents.shape[2], noisy_latents.shape[3]))
        attention = {} if recorder is None else {"recorder": recorder}
        return self.denoise(noisy_latents, timesteps, context, condition, cross_attention_kwargs=attention)

    def set_trainable(self, patterns: Sequence[str]) -> list[str]:
        """Let exactly the named parameters take gradients.

        Args:
            patterns: regular expressions, matched in full against `unet.…`, `text_encoder.…`, `adapter.…`, `words.…`.
        Returns:
            The names that matched, in the model's order.
        Raises:
            ValueError: a pattern that matches nothing.
        """
        parameters = dict(self.named_parameters())
        matched: set[str] = set()
        for pattern in patterns:
            try:
                found = [name for name in parameters if re.fullmatch(pattern, name)]
            except re.error as error:
                raise ValueError(f"trained: '{pattern}' is no regular expression ({error})") from error
            if not found:
                raise ValueError(f"trained: '{pattern}' matches no parameter of unet.…, text_encoder.… or adapter.…")
            matched.update(found)
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in matched)
        return [name for name in parameters if name in matched]


def _no_subjects(context: Tensor, latent_size: tuple[int, int]) -> SubjectCondition:
    """The condition of B rows of a plain base; no fuser reads it."""
    rows = len(context)
    return SubjectCondition(
        tokens=context.new_zeros(rows, 0, context.shape[-1]),
        keep=None,
        factor=context.new_zeros(rows),
        location=context.new_zeros(rows, 1, *latent_size),
    )
