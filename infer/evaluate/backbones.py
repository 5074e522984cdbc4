"""Networks that measure: CLIP (pictures and texts) and DINO (pictures), by hub id or folder.

`metrics/` compares pictures by their cosine. What a picture goes through first is that of the published evaluations:
DINO: shorter side to 256, bicubic, 224 from the centre, ImageNet's mean and deviation (Caron et al., ICCV 2021).
CLIP: shorter side to 224, bicubic, 224 from the centre, CLIP's own (Radford et al., ICML 2021).
A network of another size keeps these ratios. Everything is float32.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision import transforms
from transformers import AutoConfig, AutoTokenizer, CLIPModel, ViTModel

from data_pipeline.errors import UserError
from infer.drawing import usable_device
from infer.evaluate.cases import EvaluatedSubject, Photo
from infer.loading import HUB_TIMEOUT_S, hush_libraries, one_line_errors
from model.reference import prepare_reference
from train.pictures import to_uint8

BATCH = 64  # pictures or texts at once
PHOTO_SIDE = 512  # pixels of a cut-out on grey, before it is measured
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINO_RESIZE = 256 / 224  # shorter side, as a multiple of what is cut from the centre


class Backbone(ABC):
    """Turns pictures into vectors whose cosine tells how alike they are."""

    name: str  # to be written beside numbers: hub id, or name of the folder
    device: str
    looks: transforms.Compose  # RGB image -> (3, S, S)

    def __init__(self) -> None:
        self._photos: dict[EvaluatedSubject, Tensor] = {}
        self._last: tuple[tuple[Image.Image, ...], Tensor] = (), torch.empty(0)

    @abstractmethod
    def _features(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) -> (N, D)."""

    @torch.no_grad()
    def features(self, pictures: Iterable[Image.Image]) -> Tensor:
        """(N, D) float32 on the CPU, as the network gives them; pictures are opened batch by batch."""
        left, parts = iter(pictures), []
        while batch := [self.looks(picture.convert("RGB")) for picture in islice(left, BATCH)]:
            parts.append(self._features(torch.stack(batch).to(self.device)).float().cpu())
        return torch.cat(parts)  # (N, D)

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """(N, D) of unit length. The last pictures are remembered: several metrics look at the same ones."""
        before, codes = self._last
        if not are_the_same(before, pictures):
            codes = functional.normalize(self.features(pictures), dim=-1)
            self._last = tuple(pictures), codes
        return codes

    def photos(self, subject: EvaluatedSubject) -> Tensor:
        """(P, D) of unit length: all photos of a subject, the given ones first; computed once a subject.

        Raises:
            UserError: one of them cannot be read.
        """
        if subject not in self._photos:
            features = self.features(as_picture(photo) for photo in subject.photos)
            self._photos[subject] = functional.normalize(features, dim=-1)
        return self._photos[subject]


class ClipBackbone(Backbone):
    """Pictures and texts in one space."""

    def __init__(self, source: str, device: str) -> None:
        super().__init__()
        self.name, self.device = title(source), device
        self.model = load_network(CLIPModel, source, "clip", "clip").to(device)
        with one_line_errors(f"backbones.clip={source}"):
            place = located(source, "clip")
            self.tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=only_local(place))
        size = self.model.config.vision_config.image_size
        self.looks = _looks(size, size, CLIP_MEAN, CLIP_DEVIATION)

    def _features(self, pixels: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D) of unit length; a text longer than CLIP's 77 tokens loses its end."""
        parts = []
        length = self.model.config.text_config.max_position_embeddings
        for start in range(0, len(texts), BATCH):
            tokens = self.tokenizer(
                list(texts[start : start + BATCH]),
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(self.device)
            found = self.model.get_text_features(tokens.input_ids, tokens.attention_mask).pooler_output
            parts.append(found.float().cpu())
        return functional.normalize(torch.cat(parts), dim=-1)  # (N, D)


class DinoBackbone(Backbone):
    """The CLS token of a self-supervised ViT."""

    def __init__(self, source: str, device: str) -> None:
        super().__init__()
        self.name, self.device = title(source), device
        self.model = load_network(ViTModel, source, "dino", "vit", add_pooling_layer=False).to(device)
        size = self.model.config.image_size
        self.looks = _looks(round(size * DINO_RESIZE), size, IMAGENET_MEAN, IMAGENET_DEVIATION)

    def _features(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).last_hidden_state[:, 0]


@lru_cache(maxsize=1)
def load_clip(source: str, device: str) -> ClipBackbone:
    """The CLIP of that name; the last one is kept, so that all metrics share it.

    Raises:
        UserError: it cannot be had, or is no CLIP.
    """
    return ClipBackbone(source, usable_device(device))


@lru_cache(maxsize=1)
def load_dino(source: str, device: str) -> DinoBackbone:
    """The DINO of that name; the last one is kept, so that all metrics share it.

    Raises:
        UserError: it cannot be had, or is no ViT.
    """
    return DinoBackbone(source, usable_device(device))


def against_photos(code: Tensor, subjects: Sequence[EvaluatedSubject], backbone: Backbone) -> tuple[float, float]:
    """Cosine of a picture (D,) with the given photos and with all photos of a subject, mean over subjects."""
    similarity = [(subject.given, backbone.photos(subject) @ code) for subject in subjects]  # (P,) each
    given = fmean(float(values[:count].mean()) for count, values in similarity)
    return given, fmean(float(values.mean()) for _, values in similarity)


def as_picture(photo: Photo) -> Image.Image:
    """A photo as it is measured, RGB: one with transparent parts stands on mid-grey, as the models see it.

    Raises:
        UserError: it cannot be read, or shows nothing.
    """
    opened = photo.open()
    if not opened.has_transparency_data:
        return opened.convert("RGB")
    pixels = np.array(opened.convert("RGBA"))
    if (pixels[..., 3] > 127).all():
        return opened.convert("RGB")
    try:
        return Image.fromarray(to_uint8(prepare_reference(pixels, PHOTO_SIDE)))
    except ValueError as error:
        raise UserError(f"{photo.name}: {error}") from error


def are_the_same(before: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether both hold the very same objects."""
    return len(before) == len(now) and all(first is second for first, second in zip(before, now, strict=True))


def located(source: str, key: str) -> str:
    """Folder or hub id of a network, `~` expanded.

    Args:
        key: of the settings, for the message.
    Raises:
        UserError: neither a folder that is there nor what a hub id looks like.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return str(folder)
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        return source
    raise UserError(f"backbones.{key}={source}: no such folder; give a folder or a hub id, which looks like owner/name")


@lru_cache
def only_local(place: str) -> bool:
    """Whether a network must come from this disk: a folder, or a hub id while the hub cannot be reached.

    Asked once; the libraries would try for half a minute, for every file.
    """
    if Path(place).is_dir():
        return True
    try:
        HfApi().model_info(place, timeout=HUB_TIMEOUT_S)
    except HfHubHTTPError:
        return False  # it answers; what it says is told by whoever loads
    except Exception:  # the hub's client lets its transport's own errors through
        return True
    return False


def title(source: str) -> str:
    """What to call a network beside numbers: its hub id, or the name of its folder."""
    folder = Path(source).expanduser()
    return folder.resolve().name if folder.is_dir() else source


def load_network(network: Any, source: str, key: str, kind: str, **options: Any) -> Any:
    """A network of transformers from its folder or the hub, ready to look.

    Args:
        network: class that loads it.
        key: of the settings that name it, for messages.
        kind: `model_type` that its configuration must have.
    Raises:
        UserError: it cannot be had, is of another kind, or lacks weights.
    """
    hush_libraries()
    place, name = located(source, key), f"backbones.{key}={source}"
    with one_line_errors(name):
        local = only_local(place)
        found = AutoConfig.from_pretrained(place, local_files_only=local).model_type
        if found != kind:
            raise UserError(f"{name}: holds a network of type {found!r}; expected {kind!r}")
        model, told = network.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, local_files_only=local, **options
        )
    lacking = sorted(str(entry) for entry in (*told["missing_keys"], *told["mismatched_keys"]))
    if lacking:
        raise UserError(f"{name}: incomplete, lacks {len(lacking)} weights such as {lacking[0]}")
    return model.float().eval().requires_grad_(False)


def _looks(resize: int, crop: int, mean: Sequence[float], deviation: Sequence[float]) -> transforms.Compose:
    """Pillow's bicubic, which filters when it shrinks; tensors resized without that differ by 0.02 and more."""
    return transforms.Compose(
        [
            transforms.Resize(resize, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(crop),
            transforms.ToTensor(),
            transforms.Normalize(mean, deviation),
        ]
    )
