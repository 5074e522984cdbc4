"""CLIP from scratch (open_clip's own class), on scenes and on single cut-outs with their names.

Beside the contrastive loss (arXiv 2103.00020) two linear read-outs, thrown away afterwards, ask the patch tokens for
their pixels and the pooled vector for a thumbnail: what the image tower drops, no adapter can bring back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPTokenizer

from data_pipeline.toybox.world import ToyboxEntity, ToyboxScene
from model.reference import prepare_reference
from model.tokenizer import train_tokenizer
from train.data.scenes import SceneDataset, as_tensor, make_world
from train.draws import SampleDraws
from train.pictures import save_grid
from train.settings import TrainSettings, load_model_settings
from train.tasks.toybox_task import ToyboxTask

THUMBNAIL = 8  # pixels, side of the picture asked from the pooled vector
NORMALISATION = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def reference_picture(entity: ToyboxEntity, number: int, size: int) -> Tensor:
    """One reference of an entity as the image tower sees it: (3, size, size) in 0..1."""
    return prepare_reference(entity.references[number], size, entity.reference_backgrounds[number])


class ClipPairs:
    """Scene -> a picture and a caption: half the time the scene, half the time one of its references by name."""

    def __init__(self, tokenizer: CLIPTokenizer, size: int) -> None:
        self.tokenizer, self.size = tokenizer, size

    def __call__(self, scene: ToyboxScene) -> tuple[Tensor, Tensor]:
        generator = np.random.default_rng(abs(scene.index))
        if scene.entities and generator.random() < 0.5:
            entity = scene.entities[0]
            picture = reference_picture(entity, 0, self.size)
            name = entity.subject.name if generator.random() < 0.7 else entity.subject.group_word
            caption = f"a photo of a {name}"
        else:
            picture, caption = as_tensor(scene.image), scene.caption
        encoded = self.tokenizer(caption, padding="max_length", truncation=True, return_tensors="pt")
        return picture, encoded.input_ids[0]


class ClipTraining(nn.Module):
    """CLIP, its loss and the two read-outs."""

    def __init__(self, clip: open_clip.CLIP, patch: int, readout_weight: float) -> None:
        super().__init__()
        self.clip, self.patch, self.readout_weight = clip, patch, readout_weight
        width = clip.visual.ln_post.normalized_shape[0]
        self.pixels = nn.Linear(width, 3 * patch * patch)
        self.thumbnail = nn.Linear(clip.visual.output_dim, 3 * THUMBNAIL**2)
        self.loss = ClipLoss()

    def forward(self, batch: tuple[Tensor, Tensor], draws: SampleDraws, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        pictures, ids = batch  # (N, 3, H, W), (N, L)
        normalised = pictures * 2 - 1
        pooled, tokens = self.image(normalised)
        text = self.clip.encode_text(ids, normalize=True)  # (N, D)
        contrast = self.loss(functional.normalize(pooled, dim=-1), text, self.clip.logit_scale.exp().clamp(max=100))
        pixels = functional.l1_loss(self.pixels(tokens), self.patches(normalised))
        small = functional.interpolate(normalised, size=THUMBNAIL, mode="area").flatten(1)
        thumbnail = functional.l1_loss(self.thumbnail(pooled), small)
        return contrast + self.readout_weight * (pixels + thumbnail), {
            "contrast": contrast, "pixels": pixels / 2, "thumbnail": thumbnail / 2,
        }  # fmt: skip

    def image(self, normalised: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) -> pooled (N, P), patch tokens (N, T, W)."""
        self.clip.visual.output_tokens = True
        pooled, tokens = self.clip.visual(normalised)
        self.clip.visual.output_tokens = False
        return pooled, tokens

    def patches(self, pictures: Tensor) -> Tensor:
        return functional.pixel_unshuffle(pictures, self.patch).flatten(2).transpose(1, 2)  # (N, T, 3·p·p)

    def from_patches(self, rows: Tensor) -> Tensor:
        side = int(rows.shape[1] ** 0.5)
        return functional.pixel_shuffle(rows.transpose(1, 2).unflatten(2, (side, side)), self.patch)  # (N, 3, H, W)


class ClipTask(ToyboxTask):
    """`options`: readout_weight, tokenizer_captions (captions the small BPE vocabulary is learnt from)."""

    def __init__(self, settings: TrainSettings, device: torch.device) -> None:
        super().__init__(settings, device)
        options: dict[str, Any] = {"readout_weight": 1.0, "tokenizer_captions": 2000} | settings.options
        self.architecture = load_model_settings(settings.model).architecture["clip"]
        text, vision = self.architecture["text_cfg"], self.architecture["vision_cfg"]
        world = make_world(settings.data)
        folder = settings.folder / "tokenizer"
        if not (folder / "tokenizer.json").exists():
            captions = [world.scene(-1 - i).caption for i in range(options["tokenizer_captions"])]
            names = [f"a photo of a {subject.name} {subject.group_word}" for subject in world.subjects]
            train_tokenizer(captions + names, text["vocab_size"], folder, text["context_length"])
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.architecture = self.architecture | {"text_cfg": text | {"vocab_size": len(self.tokenizer)}}
        torch.manual_seed(settings.seed)
        clip = open_clip.CLIP(**self.architecture)
        self.module = ClipTraining(clip, vision["patch_size"], options["readout_weight"])
        pairs = ClipPairs(self.tokenizer, vision["image_size"])
        self.dataset = SceneDataset(world, pairs, distinct=settings.data.distinct_scenes)
        unseen = make_world(settings.data, split="val", seed=settings.data.seed + 1)
        self.unseen = self.batch(self.collate([pairs(unseen.scene(i)) for i in range(128)]))

    def collate(self, items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        pictures, ids = zip(*items, strict=True)
        return torch.stack(pictures), torch.stack(ids)

    @torch.no_grad()
    def validate(self, picture: Path) -> dict[str, float]:
        pictures, ids = self.unseen
        pooled, tokens = self.module.image(pictures * 2 - 1)
        similarity = functional.normalize(pooled, dim=-1) @ self.module.clip.encode_text(ids, normalize=True).T
        found = (similarity.argmax(dim=1) == torch.arange(len(ids), device=ids.device)).float().mean()
        drawn = (self.module.from_patches(self.module.pixels(tokens)) + 1) / 2
        thumbnails = self.module.thumbnail(pooled).unflatten(1, (3, THUMBNAIL, THUMBNAIL)) / 2 + 0.5
        thumbnails = functional.interpolate(thumbnails, size=pictures.shape[-1])
        save_grid(
            [[x for i in range(4 * y, 4 * y + 4) for x in (pictures[i], drawn[i], thumbnails[i])] for y in range(5)],
            picture,
        )
        return {"retrieval_at_1_of_128": float(found), "pixel_l1": float((drawn - pictures).abs().mean())}

    def export(self, folder: Path) -> None:
        """An open_clip folder (`local-dir:` loads it) with the tokenizer beside."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: value.detach().cpu().contiguous() for name, value in self.module.clip.state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")
        config = {"model_cfg": self.architecture, "preprocess_cfg": NORMALISATION | {"interpolation": "bicubic"}}
        (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2))
        self.tokenizer.save_pretrained(folder / "tokenizer")
