"""The cache of shards that `train cache` writes: latents and reference features, read in the stream's order.

    FOLDER/cache.json                                   what it stands on: frozen models, sizes, references, filters
    FOLDER/SOURCE/SHARD-CONTENT/0000000.safetensors …   scenes by row of the shard, some hundred a file
    FOLDER/SOURCE/SHARD-CONTENT/index.json              written last: the rows that are there, what was left out

One view of each sample: the middle crop, its references augmented once. A cache that does not fit the settings is
refused with the part that differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from data_pipeline.errors import UserError
from train.data.encoded_files import EncodedScenes, open_scenes, scenes_facts
from train.data.frozen_encoders import EncodedScene, FrozenEncoders, fingerprint
from train.settings import DataSettings
from train.stream import SamplePlace, Stream, StreamShard

ROWS_A_FILE = 500
FORMAT = 1
MANIFEST, INDEX = "cache.json", "index.json"
AGAIN = "run `subject-diffusion train cache` with this configuration and another data.cache, or undo the change"


def cache_facts(data: DataSettings, encoders: FrozenEncoders) -> dict[str, Any]:
    """All that a cached scene depends on but the shards themselves, by the name under which a person knows it."""
    facts: dict[str, Any] = {
        "format": FORMAT,
        "the autoencoder": fingerprint(encoders.vae),
        "the image tower": fingerprint(encoders.image_encoder),
        "data.size": data.size,
        "data.max_subjects": data.max_subjects,
    }
    facts |= {f"data.references.{key}": value for key, value in data.references.model_dump(mode="json").items()}
    for name, source in data.shards.items():
        if source.weight:
            facts |= {f"data.shards.{name}.filters.{k}": value for k, value in source.filters.model_dump().items()}
            facts[f"data.shards.{name}.nouns"] = None if source.nouns is None else _file_hash(source.nouns)
    return facts


def begin_cache(folder: Path, facts: Mapping[str, Any]) -> None:
    """Make the folder, or go on with one that stands on the same facts.

    Raises:
        UserError: it stands on others, or cannot be written.
    """
    manifest = folder / MANIFEST
    if manifest.exists():
        kept = _read_manifest(folder)
        _refuse_misfit(folder, kept, {name: value for name, value in facts.items() if name in kept})
        facts = {**kept, **facts}  # a further source
        if facts == kept:
            return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(manifest, facts)
    except OSError as error:
        raise UserError(f"data.cache={folder}: cannot be written ({error.strerror}); name another folder") from error


@dataclass
class CachedShard:
    """Folder of one shard in a cache."""

    folder: Path
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (N,) that are there, rising
    files: dict[int, EncodedScenes] = field(default_factory=dict)  # by first row, as far as they were asked for

    @classmethod
    def open(cls, folder: Path) -> CachedShard:
        return cls(folder, np.array(json.loads((folder / INDEX).read_text())["rows"], dtype=np.int64))

    def scene(self, row: int) -> EncodedScene | None:
        """The scene of a row; None where the sample was damaged."""
        first = row - row % ROWS_A_FILE
        start, position = (int(place) for place in np.searchsorted(self.rows, [first, row]))
        if position == len(self.rows) or self.rows[position] != row:
            return None
        if first not in self.files:
            self.files[first] = open_scenes(self.file(first))
        scene: EncodedScene = self.files[first][position - start]
        return scene

    def file(self, first: int) -> Path:
        """Of the rows from `first` on."""
        return self.folder / f"{first:07d}.safetensors"

    @property
    def is_complete(self) -> bool:
        return (self.folder / INDEX).exists()

    def complete(self) -> Counter[str]:
        """Write the index of all files that are there; returns what was kept and left out."""
        rows: list[int] = []
        counts: Counter[str] = Counter()
        for path in sorted(self.folder.glob("*.safetensors")):
            facts = scenes_facts(path)
            rows += facts["rows"]
            counts.update(facts["counts"])
        _write_json(self.folder / INDEX, {"rows": rows, "counts": dict(counts)})
        return counts

    def counts(self) -> Counter[str]:
        """What was kept and left out, of a complete shard."""
        return Counter(json.loads((self.folder / INDEX).read_text())["counts"])


class ShardCache:
    """A cache that fits the settings."""

    def __init__(self, folder: Path, stream: Stream, facts: Mapping[str, Any], *, kept_open: int) -> None:
        """
        Args:
            facts: `cache_facts` of the settings.
            kept_open: shards.
        Raises:
            UserError: the cache is missing, not complete, or stands on something else.
        """
        self.folder, self.kept_open = folder, kept_open
        if not (folder / MANIFEST).exists():
            raise UserError(
                f"data.cache={folder}: no cache there; write it with `subject-diffusion train cache` and the same "
                "configuration, or leave the key out"
            )
        _refuse_misfit(folder, _read_manifest(folder), facts)
        self.folders = {(shard.source, shard.name): shard_folder(folder, shard) for shard in stream.shards}
        missing = [shard for shard in stream.shards if not self._of(shard).is_complete]
        if missing:
            raise UserError(_told_missing(folder, missing, len(stream.shards)))
        self._open: OrderedDict[Path, CachedShard] = OrderedDict()

    def scene(self, place: SamplePlace) -> EncodedScene | None:
        """The scene that lies there; None where the sample was damaged."""
        folder = self.folders[place.source, place.shard]
        if folder not in self._open:
            self._open[folder] = CachedShard.open(folder)
            while len(self._open) > self.kept_open:
                self._open.popitem(last=False)
        self._open.move_to_end(folder)
        return self._open[folder].scene(place.row)

    def _of(self, shard: StreamShard) -> CachedShard:
        return CachedShard(self.folders[shard.source, shard.name])


def shard_folder(cache: Path, shard: StreamShard) -> Path:
    """Where a shard's scenes lie; a rebuilt shard has another folder."""
    return cache / quote(shard.source, safe="") / f"{shard.name}-{shard.entry.sha256[:12]}"


def _told_missing(folder: Path, missing: Sequence[StreamShard], count: int) -> str:
    first = missing[0]
    others = [path for path in shard_folder(folder, first).parent.glob(f"{first.name}-*") if (path / INDEX).exists()]
    why = "was rebuilt since" if others else "is not in it"
    return (
        f"data.cache={folder}: {len(missing)} of {count} shards are missing; {first.source}/{first.name} {why}; "
        "run `subject-diffusion train cache` with this configuration: it adds what is missing"
    )


def _refuse_misfit(folder: Path, kept: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    for name, value in facts.items():
        if name not in kept:
            raise UserError(f"data.cache={folder}: made without {name}; {AGAIN}")
        if kept[name] != value:
            raise UserError(f"data.cache={folder}: made with another {name} ({kept[name]}, now {value}); {AGAIN}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST}: cannot be read ({error}); remove {folder}") from error
    if not isinstance(facts, dict):
        raise UserError(f"{folder / MANIFEST}: not the manifest of a cache; remove {folder}")
    return facts


def _write_json(path: Path, value: Any) -> None:
    part = path.with_suffix(f".part{os.getpid()}")
    part.write_text(json.dumps(value, indent=1))
    part.replace(path)


def _file_hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.expanduser().read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"nouns={path}: cannot be read ({error.strerror})") from error
