"""Pools of scenes whose latents and reference features are computed once and read many times.

The autoencoder and the image tower are frozen, so for tasks base and subject their work is done once a pool: chunks of
scenes are rendered, encoded and written beside each other (each atomically, so that a killed build goes on), then held
in memory in half precision. A pool is passed over `cache_passes` times, each time in another order.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data_pipeline.toybox.world import ToyboxEntity, ToyboxScene
from model.image_encoder import SubjectImageEncoder
from model.reference import prepare_reference
from train.scenes import SceneDataset, as_tensor, open_world
from train.settings import DataSettings
from train.shard_scenes import ShardEntity, ShardScene, ShardWorld

Scene = ToyboxScene | ShardScene

CHUNK = 500  # scenes a file
GROUP = 64  # scenes with like numbers of subjects that stand together
GROUPS_A_WINDOW = 16
MASK_SIZE = 16  # pixels, side of the stored entity masks


@dataclass(frozen=True)
class EncodedScene:
    """A scene as the frozen models see it."""

    latents: Tensor  # (C, h, w) scaled
    caption: str
    nouns: tuple[str, ...]
    spans: tuple[tuple[int, int] | None, ...]  # characters of the caption; None: not named there
    boxes: Tensor  # (S, 4) xyxy fractions
    masks: Tensor  # (S, MASK_SIZE, MASK_SIZE) 0..1, share of each cell that is the entity
    pooled: Tensor  # (R, P) of all references of all entities, in order
    patches: Tensor  # (R, T, W)
    reference_counts: tuple[int, ...]  # references of each entity, sums to R


def same_image_reference(scene: Scene, entity: ToyboxEntity | ShardEntity) -> np.ndarray:
    """The entity cut out of the target picture itself: (h, w, 4) RGBA uint8."""
    x0, y0, x1, y1 = (round(value) for value in entity.box_xyxy_px)
    rgba = np.dstack([scene.image, entity.mask.astype(np.uint8) * 255])
    return rgba[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]


class SceneEncoder:
    """Frozen autoencoder and image tower; scenes in, encoded scenes out."""

    def __init__(
        self, vae: AutoencoderKL, image_encoder: SubjectImageEncoder, device: torch.device, *, same_image: bool
    ) -> None:
        self.vae, self.image_encoder = vae.to(device).eval(), image_encoder.to(device).eval()
        self.device, self.same_image = device, same_image

    def prepare(self, scene: Scene) -> tuple[Scene, list[Tensor]]:
        """References as the image tower takes them; runs in the rendering processes."""
        size = self.image_encoder.image_size
        cutouts: list[tuple[np.ndarray, np.ndarray | None]]
        if self.same_image:
            cutouts = [(same_image_reference(scene, entity), None) for entity in scene.entities]
        else:
            cutouts = [pair for e in scene.entities for pair in zip(e.references, e.reference_backgrounds, strict=True)]
        return scene, [prepare_reference(cutout, size, background) for cutout, background in cutouts]

    @torch.no_grad()
    def encode(self, prepared: list[tuple[Scene, list[Tensor]]]) -> list[EncodedScene]:
        pictures = torch.stack([as_tensor(scene.image) for scene, _ in prepared]).to(self.device) * 2 - 1
        latents = self.vae.encode(pictures).latent_dist.mean * self.vae.config.scaling_factor
        references = [picture for _, pictures in prepared for picture in pictures]
        encoder = self.image_encoder
        if references:
            pooled, patches = encoder(torch.stack(references).to(self.device))
        else:
            pooled = torch.zeros(0, encoder.pooled_dim)
            patches = torch.zeros(0, encoder.num_patches, encoder.patch_dim)
        pooled, patches = pooled.half().cpu(), patches.half().cpu()
        encoded, start = [], 0
        for (scene, pictures_of), row in zip(prepared, latents.half().cpu(), strict=True):
            end = start + len(pictures_of)
            encoded.append(self._scene(scene, row, pooled[start:end], patches[start:end]))
            start = end
        return encoded

    def _scene(self, scene: Scene, latents: Tensor, pooled: Tensor, patches: Tensor) -> EncodedScene:
        size = scene.image.shape[0]
        masks = [torch.from_numpy(e.mask.astype(np.float32)) for e in scene.entities]
        stacked = torch.stack(masks)[:, None] if masks else torch.zeros(0, 1, size, size)
        boxes = torch.tensor([e.box_xyxy_px for e in scene.entities], dtype=torch.float32).reshape(-1, 4) / size
        return EncodedScene(
            latents=latents,
            caption=scene.caption,
            nouns=tuple(e.noun for e in scene.entities),
            spans=tuple(e.span for e in scene.entities),
            boxes=boxes,
            masks=torch.nn.functional.adaptive_avg_pool2d(stacked, MASK_SIZE)[:, 0].half(),
            pooled=pooled,
            patches=patches,
            reference_counts=tuple(1 if self.same_image else len(e.references) for e in scene.entities),
        )


class _Prepared(Dataset[Any]):
    def __init__(self, scenes: SceneDataset, indices: range) -> None:
        self.scenes, self.indices = scenes, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Any:
        return self.scenes[self.indices[position]]


class CachedScenes(Dataset[EncodedScene]):
    """Encoded scene of sample i: pool i // (scenes · passes), in a new order in each pass unless `shuffle` is off."""

    def __init__(
        self,
        data: DataSettings,
        encoder: SceneEncoder,
        folder: Path,
        *,
        split: str | None = None,
        shuffle: bool = True,
    ) -> None:
        self.data, self.encoder, self.shuffle = data, encoder, shuffle
        world = open_world(data, split=split, need_references=not encoder.same_image)
        self.scenes = SceneDataset(world, encoder.prepare)
        self.folder = folder / f"cache-{self._fingerprint(split)}"
        self.pool, self.pool_number = [], -1  # type: list[EncodedScene], int
        self.order, self.ordered = np.zeros(0, np.int64), (-1, -1)  # positions in the pool; of which pool and pass

    def _fingerprint(self, split: str | None) -> str:
        world = self.scenes.world
        contents = world.contents if isinstance(world, ShardWorld) else []
        digest = hashlib.sha256(json.dumps([self.data.model_dump(), split, self.encoder.same_image, contents]).encode())
        for module in (self.encoder.vae, self.encoder.image_encoder):
            for name, value in sorted(module.state_dict().items()):
                digest.update(name.encode())
                digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:12]

    def __getitem__(self, index: int) -> EncodedScene:
        count, passes = self.data.cache_scenes, self.data.cache_passes
        number, position = divmod(index, count * passes)
        if number != self.pool_number:
            self.pool, self.pool_number = self._load(number), number
        pass_number, position = divmod(position, count)
        if not self.shuffle:
            return self.pool[position]
        if (number, pass_number) != self.ordered:
            rng = np.random.default_rng((self.data.seed, number, pass_number))
            sizes = np.array([len(scene.nouns) for scene in self.pool])
            self.order, self.ordered = grouped_order(sizes, rng), (number, pass_number)
        return self.pool[int(self.order[position])]

    def _load(self, number: int) -> list[EncodedScene]:
        folder = self.folder / f"pool-{number:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        for older in self.folder.glob("pool-*"):
            if older.name < folder.name:
                shutil.rmtree(older)
        pool: list[EncodedScene] = []
        starts = range(0, self.data.cache_scenes, CHUNK)
        for start in tqdm(starts, desc=f"encoding pool {number}", unit="chunk", mininterval=10):
            path = folder / f"chunk-{start:07d}.safetensors"
            first = number * self.data.cache_scenes + start
            if not path.exists():
                scenes = self._encode(range(first, first + min(CHUNK, self.data.cache_scenes - start)))
                write_scenes(scenes, path)
            pool += read_scenes(path)
        return pool

    def _encode(self, indices: range) -> list[EncodedScene]:
        loader = DataLoader(
            _Prepared(self.scenes, indices), batch_size=50, num_workers=self.data.workers, collate_fn=list
        )
        return [encoded for prepared in loader for encoded in self.encoder.encode(prepared)]


def grouped_order(sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random order in which scenes with like numbers of subjects stand together.

    A batch is padded to its fullest scene, and its padding costs as much as subjects do. Windows of a random
    permutation are sorted by size and cut into groups; the groups are shuffled.

    Args:
        sizes: (N,) subjects of each scene.
    Returns:
        (N,) permutation.
    """
    order = rng.permutation(len(sizes))
    window = GROUP * GROUPS_A_WINDOW
    groups: list[np.ndarray] = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(sizes[part], kind="stable")]
        groups += [part[first : first + GROUP] for first in range(0, len(part), GROUP)]
    whole = [group for group in groups if len(group) == GROUP]
    rest = [group for group in groups if len(group) < GROUP]  # last, so that groups stay aligned with batches
    return np.concatenate([*(whole[i] for i in rng.permutation(len(whole))), *rest])


def write_scenes(scenes: list[EncodedScene], path: Path) -> None:
    """One file of tensors (ragged ones end to end) with the captions in its header, renamed into place."""
    tensors = {
        name: torch.cat([getattr(scene, name) for scene in scenes]) for name in ("boxes", "masks", "pooled", "patches")
    } | {"latents": torch.stack([scene.latents for scene in scenes])}
    texts = [[s.caption, s.nouns, s.spans, s.reference_counts] for s in scenes]
    part = path.with_suffix(f".part{os.getpid()}")  # several processes may build the same pool
    save_file(tensors, part, metadata={"scenes": json.dumps(texts)})
    part.rename(path)


def read_scenes(path: Path) -> list[EncodedScene]:
    """The scenes that `write_scenes` wrote."""
    tensors = load_file(path)
    with safe_open(path, "pt") as handle:
        texts = json.loads(handle.metadata()["scenes"])
    scenes, entity, reference = [], 0, 0
    for latents, (caption, nouns, spans, counts) in zip(tensors["latents"], texts, strict=True):
        entities, references = entity + len(nouns), reference + sum(counts)
        scenes.append(
            EncodedScene(
                latents,
                caption,
                tuple(nouns),
                tuple(tuple(span) if span else None for span in spans),
                tensors["boxes"][entity:entities],
                tensors["masks"][entity:entities],
                tensors["pooled"][reference:references],
                tensors["patches"][reference:references],
                tuple(counts),
            )  # fmt: skip
        )
        entity, reference = entities, references
    return scenes
