"""The check `nsfw`: how sure an image classifier is of one of its labels; by default, that the picture is not for work.

Any classifier of transformers does; a classifier is wrong now and then, so this thins such pictures out, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.record import Provenance
from data_pipeline.settings import Settings
from data_pipeline.stages import Picture
from data_pipeline.stages.pretrained import DtypeName, Pretrained, find_pretrained, resolve_dtype


class NsfwSettings(Settings):
    """A picture is left out where the classifier gives the label more than the limit."""

    check: Literal["nsfw"] = "nsfw"
    model: str = "Falconsai/nsfw_image_detection"  # image classifier: folder or hub id
    revision: str | None = None  # branch, tag or commit of a hub id; null: its main branch
    label: str = "nsfw"  # the classifier's label whose probability counts; capitals do not matter
    limit: float = Field(0.5, ge=0, le=1)  # probability above which a picture is left out
    dtype: DtypeName = "auto"  # of the weights; auto: float32 on a CPU, a half on accelerators
    batch_size: int = Field(64, ge=1)  # pictures at once

    def load(self, device: str) -> NsfwCheck:
        """The check on a device.

        Raises:
            UserError: the model cannot be had, is no image classifier, or has no such label.
        """
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        found = find_pretrained("checks.nsfw.model", self.model, self.revision)
        network = found.network(AutoModelForImageClassification, (), device, resolve_dtype(self.dtype, device))
        return NsfwCheck(found, network, found.processor(AutoImageProcessor), self.label)


class NsfwCheck:
    """Gives each picture the probability of one label."""

    def __init__(self, found: Pretrained, network: Any, processor: Any, label: str) -> None:
        self.provenance: Provenance = found.provenance("nsfw")
        self.network, self.processor = network, processor
        names = {name.lower(): number for number, name in network.config.id2label.items()}
        if label.lower() not in names:
            raise UserError(f"{found}: knows no label {label!r}; give label= one of {', '.join(names)}")
        self.label = names[label.lower()]

    def score(self, pictures: Sequence[Picture]) -> list[float]:
        import torch

        if not pictures:
            return []
        with torch.inference_mode():
            inputs = self.processor(
                list(pictures), input_data_format="channels_last", device=self.network.device, return_tensors="pt"
            )
            logits = self.network(inputs["pixel_values"].to(self.network.dtype)).logits.float()  # (N, labels)
        if self.network.config.problem_type == "multi_label_classification":
            return logits[:, self.label].sigmoid().tolist()
        return logits.softmax(dim=-1)[:, self.label].tolist()
