"""Files of encoded scenes: tensors of many scenes end to end, their texts in the header (safetensors).

A file is read whole into memory (pools) or scene by scene through safetensors' slices (caches larger than memory).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from train.data.frozen_encoders import EncodedScene

RAGGED = ("boxes", "masks", "pooled", "patches")


class EncodedScenes(Sequence[EncodedScene]):
    """The scenes of a file."""

    def __init__(self, tensors: Mapping[str, Any], texts: list[list[Any]]) -> None:
        """
        Args:
            tensors: what `write_scenes` wrote, as tensors or as slices of a file.
        """
        self.tensors, self.texts = tensors, texts
        self.entities = np.cumsum([0, *(len(nouns) for _, _, nouns, _, _ in texts)])
        self.references = np.cumsum([0, *(sum(counts) for *_, counts in texts)])

    @property
    def keys(self) -> list[str]:
        return [key for key, *_ in self.texts]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, row: Any) -> Any:
        key, caption, nouns, spans, counts = self.texts[row]
        entities = slice(int(self.entities[row]), int(self.entities[row + 1]))
        references = slice(int(self.references[row]), int(self.references[row + 1]))
        return EncodedScene(
            latents=self.tensors["latents"][row : row + 1][0],
            caption=caption,
            nouns=tuple(nouns),
            spans=tuple(tuple(span) if span else None for span in spans),
            boxes=self.tensors["boxes"][entities],
            masks=self.tensors["masks"][entities],
            pooled=self.tensors["pooled"][references],
            patches=self.tensors["patches"][references],
            reference_counts=tuple(counts),
            key=key,
            latent_std=self.tensors["latent_std"][row : row + 1][0] if "latent_std" in self.tensors else None,
        )


def write_scenes(
    scenes: Sequence[EncodedScene], path: Path, part: Path, facts: Mapping[str, Any] | None = None
) -> None:
    """Write `part` and rename it to `path`.

    Args:
        scenes: at least one; all keep the posterior's spread or none does.
        facts: plain values to stand in the header.
    """
    tensors = {name: torch.cat([getattr(scene, name) for scene in scenes]) for name in RAGGED}
    tensors["latents"] = torch.stack([scene.latents for scene in scenes])
    spreads = [scene.latent_std for scene in scenes if scene.latent_std is not None]
    if spreads:
        tensors["latent_std"] = torch.stack(spreads)
    texts = [[s.key, s.caption, s.nouns, s.spans, s.reference_counts] for s in scenes]
    save_file(tensors, part, metadata={"scenes": json.dumps(texts), "facts": json.dumps(dict(facts or {}))})
    part.rename(path)


def read_scenes(path: Path) -> EncodedScenes:
    """All scenes of a file, in memory."""
    with safe_open(path, "pt") as handle:
        texts = json.loads(handle.metadata()["scenes"])
    return EncodedScenes(load_file(path), texts)


def open_scenes(path: Path) -> EncodedScenes:
    """The scenes of a file, each read when it is asked for."""
    handle = safe_open(path, "pt")
    slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118  not a dictionary
    return EncodedScenes(slices, json.loads(handle.metadata()["scenes"]))


def scenes_facts(path: Path) -> dict[str, Any]:
    """The facts in a file's header."""
    with safe_open(path, "pt") as handle:
        facts: dict[str, Any] = json.loads(handle.metadata()["facts"])
    return facts
