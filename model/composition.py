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

from model.attention_maps import AttentionMapRecorder
from model.inputs import SubjectInputs
from model.subject_adapter import SubjectAdapter, SubjectCondition
from model.text_fusion import encode_prompt


class SubjectDiffusionModel(nn.Module):
    """A stock base with the adapter attached.

    Args:
        unet: plain UNet; the adapter hooks into it, its own parameters stay as they are.
        text_encoder: stock CLIP text model.
        adapter: made for this UNet.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, adapter: SubjectAdapter) -> None:
        super().__init__()
        if text_encoder.config.hidden_size != adapter.config["text_dim"]:
            raise ValueError(
                f"subject adapter: the text encoder is {text_encoder.config.hidden_size} wide, "
                f"the adapter was made for {adapter.config['text_dim']}"
            )
        self.unet, self.text_encoder, self.adapter = unet, text_encoder, adapter
        adapter.attach(unet)

    def encode(
        self,
        inputs: SubjectInputs,
        latent_size: tuple[int, int],
        beta: float = 1.0,
        inference: bool = False,
    ) -> tuple[Tensor, SubjectCondition]:
        """Text and subjects of B pictures, as the UNet takes them.

        Args:
            inputs: conditions with S subjects; S may be 0.
            latent_size: (h, w) of the latents.
            beta: factor on the adapter's residuals.
            inference: compute the fusers' keys and values now, and let them skip rows without subjects.
        Returns:
            context (B, L, D) and the condition of the same B rows.
        """
        embedding = self.text_encoder.embeddings.token_embedding
        config = self.adapter.config
        context = encode_prompt(
            self.text_encoder,
            inputs.input_ids,
            self.adapter.concepts(inputs, embedding),  # (B, S, D)
            inputs.placeholder_positions,
            fusion=config["fusion"],
            scale=config["fusion_scale"],
        )  # (B, L, D)
        condition = self.adapter.condition(inputs, latent_size, beta=beta, skip_null_rows=inference)
        return context, self.adapter.precompute(condition) if inference else condition

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
        attention = {**(kwargs.pop("cross_attention_kwargs", None) or {}), "gligen": {"objs": condition}}
        return self.unet(
            latents,
            timesteps,
            encoder_hidden_states=context,
            cross_attention_kwargs=attention,
            return_dict=False,
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
            patterns: regular expressions, matched in full against `unet.…`, `text_encoder.…`, `adapter.…`.
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
