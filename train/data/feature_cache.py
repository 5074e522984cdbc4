"""Pools of toybox scenes whose latents and reference features are computed once and read many times.

The autoencoder and the image tower are frozen, so for tasks base and subject their work is done once a pool: chunks of
scenes are rendered, encoded and written beside each other (each atomically, so that a killed build goes on), then held
in memory in half precision. A pool is passed over `cache_passes` times, each time in another order. Of the posterior
the mean alone is kept. Several processes share the work through the files; none waits for one that died.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from train.data.encoded_files import read_scenes, write_scenes
from train.data.frozen_encoders import EncodedScene, FrozenEncoders, fingerprint
from train.data.live_scenes import ToyboxScenes
from train.engine.processes import Processes
from train.settings import DataSettings

CHUNK = 500  # scenes a file
GROUP = 64  # scenes with like numbers of subjects that stand together
GROUPS_A_WINDOW = 16
PATIENCE_S = 120.0  # without a new chunk of another process, before its chunks are encoded here
FORMAT = 2  # of what is kept of a scene


class _Some(Dataset[Any]):
    def __init__(self, scenes: Dataset[Any], numbers: range) -> None:
        self.scenes, self.numbers = scenes, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, position: int) -> Any:
        return self.scenes[self.numbers[position]]


class CachedScenes(Dataset[EncodedScene]):
    """Encoded scene of sample i: pool i // (scenes · passes), in a new order in each pass unless `shuffle` is off."""

    def __init__(
        self,
        data: DataSettings,
        encoders: FrozenEncoders,
        folder: Path,
        *,
        split: str | None = None,
        shuffle: bool = True,
    ) -> None:
        self.data, self.encoders, self.shuffle = data, encoders, shuffle
        self.scenes = ToyboxScenes(data, encoders.image_size, split=split)
        self.folder = folder / f"cache-{self._fingerprint(split)}"
        self.processes = Processes.from_environment()
        self.pool, self.pool_number = [], -1  # type: list[EncodedScene], int
        self.order, self.ordered = np.zeros(0, np.int64), (-1, -1)  # positions in the pool; of which pool and pass

    def _fingerprint(self, split: str | None) -> str:
        keys = {"toybox", "references", "seed", "size", "max_subjects", "cache_scenes"}
        data = self.data.model_dump(mode="json", include=keys)
        models = [fingerprint(module) for module in (self.encoders.vae, self.encoders.image_encoder)]
        return hashlib.sha256(json.dumps([FORMAT, data, split, models]).encode()).hexdigest()[:12]

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

    def build(self, number: int = 0) -> Path:
        """Encode what is missing of a pool; returns its folder, complete."""
        folder = self.folder / f"pool-{number:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        for older in self.folder.glob("pool-*"):
            if older.name < folder.name:
                shutil.rmtree(older, ignore_errors=True)
        chunks = {folder / f"chunk-{s:07d}.safetensors": s for s in range(0, self.data.cache_scenes, CHUNK)}
        progress = tqdm(total=len(chunks), desc=f"encoding pool {number}", unit="chunk", mininterval=10)
        for path in own_share(list(chunks), self.processes):
            self._write(path, chunks[path], number)
            progress.update(sum(chunk.exists() for chunk in chunks) - progress.n)
        changed = time.monotonic()
        while missing := [path for path in chunks if not path.exists()]:
            if len(chunks) - len(missing) > progress.n:
                progress.update(len(chunks) - len(missing) - progress.n)
                changed = time.monotonic()
            elif time.monotonic() - changed > PATIENCE_S:
                self._write(missing[0], chunks[missing[0]], number)
            else:
                time.sleep(0.2)
        progress.update(len(chunks) - progress.n)
        progress.close()
        return folder

    def _load(self, number: int) -> list[EncodedScene]:
        folder = self.build(number)
        return [scene for path in sorted(folder.glob("chunk-*.safetensors")) for scene in read_scenes(path)]

    def _write(self, path: Path, start: int, number: int) -> None:
        if path.exists():
            return
        first = number * self.data.cache_scenes + start
        scenes = self._encode(range(first, first + min(CHUNK, self.data.cache_scenes - start)))
        # Another process may be writing the same chunk: each writes a file of its own, both are the same.
        write_scenes(scenes, path, path.with_suffix(f".part{self.processes.index}-{os.getpid()}"))

    def _encode(self, numbers: range) -> list[EncodedScene]:
        loader = DataLoader(
            _Some(self.scenes, numbers), batch_size=50, num_workers=self.data.workers, collate_fn=list
        )  # fmt: skip
        return [scene for prepared in loader for scene in self.encoders.encode(prepared, keep_std=False)]


def own_share(chunks: list[Path], processes: Processes) -> list[Path]:
    """The chunks that a process encodes, in the order in which it does.

    Each machine goes through all of them, since another's disk may be another; the machines begin apart, so that on a
    shared disk each finds what the others have done.
    """
    mine = chunks[processes.local_index :: processes.local_count]
    start = len(mine) * processes.machine // max(processes.machines, 1)
    return mine[start:] + mine[:start]


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
