"""Captions as the source has them: the alt text, tidied. Needs no model and looks at no picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from data_pipeline.record import Provenance
from data_pipeline.settings import Settings
from data_pipeline.stages import Picture
from data_pipeline.stages.caption import tidy


class AltTextSettings(Settings):
    """The alt text is the caption."""

    backend: Literal["alt_text"] = "alt_text"
    batch_size: int = Field(256, ge=1)  # texts at once; decides nothing but the grain of the work

    def load(self, device: str) -> AltTextCaptioner:
        """The captioner; `device` is not used."""
        return AltTextCaptioner()


class AltTextCaptioner:
    """Says of a picture what its source said."""

    provenance = Provenance("alt_text")

    def caption(self, pictures: Sequence[Picture], alt_texts: Sequence[str]) -> list[str]:
        return [tidy(text) for text in alt_texts]
