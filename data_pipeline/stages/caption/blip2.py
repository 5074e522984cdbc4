"""Captions by BLIP-2 (Li et al., ICML 2023): a frozen ViT, a Q-Former and a language model (OPT or Flan-T5).

All pictures become the same small square, so any sizes go into one batch; the prompt is the same for all, so nothing
is padded and a caption does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.record import Provenance
from data_pipeline.settings import Settings
from data_pipeline.stages import Picture
from data_pipeline.stages.caption import first_line, plain_generation
from data_pipeline.stages.pretrained import DtypeName, Pretrained, find_pretrained, one_line_errors, resolve_dtype

if TYPE_CHECKING:
    import torch


class Blip2Settings(Settings):
    """BLIP-2 through transformers."""

    backend: Literal["blip2"] = "blip2"
    model: str = "Salesforce/blip2-opt-2.7b"  # folder or hub id
    revision: str | None = None  # branch, tag or commit of a hub id; null: its main branch
    dtype: DtypeName = "auto"  # of the weights; auto: float32 on a CPU, a half on accelerators (Flan-T5: bfloat16 only)
    batch_size: int = Field(64, ge=1)  # pictures at once; decoding waits for memory, so large ones are nearly free
    max_new_tokens: int = Field(30, ge=1)  # length of a caption, in tokens of the language model
    num_beams: int = Field(1, ge=1)  # beams of the search; 1 is greedy
    prompt: str = ""  # what the model goes on from ("a photo of"); not part of the caption

    def load(self, device: str) -> Blip2Captioner:
        """The captioner on a device.

        Raises:
            UserError: the model cannot be had, is no BLIP-2, or its files do not fit each other.
        """
        from transformers import Blip2ForConditionalGeneration, Blip2Processor

        found = find_pretrained("caption.model", self.model, self.revision)
        dtype = resolve_dtype(self.dtype, device)
        network = found.network(Blip2ForConditionalGeneration, ("blip-2",), device, dtype)
        return Blip2Captioner(found, network, found.processor(Blip2Processor), self)


class Blip2Captioner:
    """Says what is in a picture, in the words of a language model."""

    def __init__(self, found: Pretrained, network: Any, processor: Any, settings: Blip2Settings) -> None:
        self.provenance: Provenance = found.provenance("blip2")
        self.network, self.processor = network, processor
        language = network.language_model
        language.generation_config = plain_generation(
            (network.generation_config, language.generation_config), settings.num_beams, settings.max_new_tokens
        )
        self.prompt = _prompt(found, network, processor, settings.prompt)  # (1, T)

    def caption(self, pictures: Sequence[Picture], alt_texts: Sequence[str]) -> list[str]:
        import torch

        if not pictures:
            return []
        with torch.inference_mode():
            prompt = self.prompt.expand(len(pictures), -1)  # (N, T)
            written = self.network.generate(
                pixel_values=self.pixels(pictures), input_ids=prompt, attention_mask=torch.ones_like(prompt)
            )  # (N, T + new), without the T where an encoder reads the prompt
        if not self.network.config.is_encoder_decoder:
            written = written[:, prompt.shape[1] :]
        return [first_line(text) for text in self.processor.batch_decode(written, skip_special_tokens=True)]

    def pixels(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """(N, 3, S, S) float32, resized where the network is; the vision model casts them itself."""
        inputs = self.processor.image_processor(
            list(pictures), input_data_format="channels_last", device=self.prompt.device, return_tensors="pt"
        )
        return inputs["pixel_values"]


def _prompt(found: Pretrained, network: Any, processor: Any, text: str) -> torch.Tensor:
    """Places for the picture, then the text, as token numbers (1, T)."""
    if processor.num_query_tokens is None:
        processor.num_query_tokens = network.config.num_query_tokens
    image = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
    if image != network.config.image_token_index:
        raise UserError(
            f"{found}: config.json says image_token_index={network.config.image_token_index}, and the tokenizer's "
            f"{processor.image_token} is {image}: files of an older transformers; take the model's newest revision"
        )
    import numpy as np

    with one_line_errors(str(found)):
        blank = np.zeros((8, 8, 3), np.uint8)
        return processor(images=blank, text=[text], return_tensors="pt")["input_ids"].to(network.device)
