"""Captions by BLIP (Li et al., ICML 2022): a ViT and a small text decoder that looks at it.

What the published data of Subject-Diffusion was captioned with. As for BLIP-2, pictures of any size go into one batch
and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from data_pipeline.record import Provenance
from data_pipeline.settings import Settings
from data_pipeline.stages import Picture
from data_pipeline.stages.caption import first_line, plain_generation
from data_pipeline.stages.pretrained import DtypeName, Pretrained, find_pretrained, resolve_dtype

if TYPE_CHECKING:
    import torch


class BlipSettings(Settings):
    """BLIP through transformers."""

    backend: Literal["blip"] = "blip"
    model: str = "Salesforce/blip-image-captioning-large"  # folder or hub id
    revision: str | None = None  # branch, tag or commit of a hub id; null: its main branch
    dtype: DtypeName = "auto"  # of the weights; auto: float32 on a CPU, a half on accelerators
    batch_size: int = Field(64, ge=1)  # pictures at once
    max_new_tokens: int = Field(30, ge=1)  # length of a caption, in tokens of the decoder
    num_beams: int = Field(1, ge=1)  # beams of the search; 1 is greedy
    prompt: str = ""  # what the decoder goes on from ("a photo of"); not part of the caption

    def load(self, device: str) -> BlipCaptioner:
        """The captioner on a device.

        Raises:
            UserError: the model cannot be had or is no BLIP.
        """
        from transformers import BlipForConditionalGeneration, BlipProcessor

        found = find_pretrained("caption.model", self.model, self.revision)
        dtype = resolve_dtype(self.dtype, device)
        network = found.network(BlipForConditionalGeneration, ("blip",), device, dtype)
        return BlipCaptioner(found, network, found.processor(BlipProcessor), self)


class BlipCaptioner:
    """Says what is in a picture, in the words of captions from the web."""

    def __init__(self, found: Pretrained, network: Any, processor: Any, settings: BlipSettings) -> None:
        self.provenance: Provenance = found.provenance("blip")
        self.network, self.processor = network, processor
        decoder = network.text_decoder
        decoder.generation_config = plain_generation(
            (network.generation_config, decoder.generation_config), settings.num_beams, settings.max_new_tokens
        )
        tokens = processor.tokenizer([settings.prompt], return_tensors="pt")["input_ids"]
        self.prompt = tokens.to(network.device)  # (1, T): [CLS] prompt [SEP]; the model takes its own begin and no end

    def caption(self, pictures: Sequence[Picture], alt_texts: Sequence[str]) -> list[str]:
        import torch

        if not pictures:
            return []
        with torch.inference_mode():
            prompt = self.prompt.repeat(len(pictures), 1)  # (N, T); copies, since the model writes into them
            written = self.network.generate(
                pixel_values=self.pixels(pictures), input_ids=prompt, attention_mask=torch.ones_like(prompt)
            )  # (N, T - 1 + new)
        written = written[:, prompt.shape[1] - 1 :]
        return [first_line(text) for text in self.processor.batch_decode(written, skip_special_tokens=True)]

    def pixels(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """(N, 3, S, S) float32, resized where the network is; the vision model casts them itself."""
        inputs = self.processor.image_processor(
            list(pictures), input_data_format="channels_last", device=self.prompt.device, return_tensors="pt"
        )
        return inputs["pixel_values"]
