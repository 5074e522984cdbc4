"""The file of a refinement: safetensors, small, with everything in its header that says what it is and fits on.

`read_refinement` also takes textual-inversion files of diffusers (`learned_embeds.safetensors`). Files that are read
with pickle (.bin, .pt, .ckpt) are refused: loading one can run any code.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.errors import UserError
from infer.picture_file import encode_picture
from infer.subjects import PICKLED, Subject

FORMAT = "subject-diffusion-refinement"
FORMAT_VERSION = 1
PREVIEW = "preview"  # (h, w, 3) uint8
REFERENCES = "references"  # .NUMBER.PLACEHOLDER: a PNG file's bytes (N,) uint8; numbers of three digits, in order
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Refinement:
    """One or more subjects learnt on one base."""

    method: str
    base: str  # name of the base
    fingerprint: str  # of its UNet and text encoder; "" where the file does not say (other programs')
    words: dict[str, dict[str, Any]]  # placeholder -> what it stands for: class_word, kind, vectors …
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)  # resolved, of the run that made it
    steps: int = 0  # done
    preview: np.ndarray | None = None  # (h, w, 3) uint8
    references: dict[str, tuple[Image.Image, ...]] = field(default_factory=dict)  # placeholder -> RGBA cut-outs shown
    path: Path | None = None  # where it was read from
    strength: float = 1.0  # factor on what it adds, told when it is put to use; methods that have one

    @property
    def label(self) -> str:
        """How a person knows it."""
        return str(self.path) if self.path else f"{self.method} of {', '.join(self.words) or 'pairs'}"

    def digest(self) -> str:
        """64 hexadecimal digits that tell what is learnt apart."""
        digest = hashlib.sha256(json.dumps([self.method, self.words, self.strength], sort_keys=True).encode())
        for name, value in sorted(self.tensors.items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        for placeholder, cutouts in self.references.items():
            for cutout in cutouts:
                digest.update(f"{placeholder} {cutout.size}".encode() + cutout.tobytes())
        return digest.hexdigest()

    def subjects(self) -> list[Subject]:
        """What is shown to the model beside its words."""
        return [
            Subject(self.words[word]["class_word"], list(cutouts), strength=self.strength, word=word)
            for word, cutouts in self.references.items()
        ]

    def check_base(self, name: str, fingerprint: str) -> None:
        """Refuse another base than the one it was made on.

        Raises:
            UserError: the fingerprints differ; names both bases.
        """
        if self.fingerprint and self.fingerprint != fingerprint:
            raise UserError(
                f"{self.label}: was made on base {self.base} ({self.fingerprint[:12]}), this is {name} "
                f"({fingerprint[:12]}); draw with the base it was made on, or refine again on this one"
            )


def write_refinement(refinement: Refinement, path: Path) -> None:
    """Write the file whole or not at all.

    Raises:
        UserError: it cannot be written; what stood there before stays.
    """
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        **{name: getattr(refinement, name) for name in ("method", "base", "fingerprint", "words", "settings", "steps")},
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in refinement.tensors.items()}
    if refinement.preview is not None:
        tensors[PREVIEW] = torch.from_numpy(np.ascontiguousarray(refinement.preview))
    for word, cutouts in refinement.references.items():
        for number, cutout in enumerate(cutouts):
            content = np.frombuffer(encode_picture(cutout), np.uint8).copy()
            tensors[f"{REFERENCES}.{number:03}.{word}"] = torch.from_numpy(content)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, part, metadata={"subject_diffusion": json.dumps(header)})
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: cannot be written ({reason}); free the disk or give another output") from error


def read_refinement(path: Path) -> Refinement:
    """Read a refinement, or a textual-inversion file of diffusers.

    Raises:
        UserError: no such file, pickled, damaged, or no refinement.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a refinement ({SUFFIX}) that `refine` wrote")
    if path.suffix.lower() in PICKLED:
        raise UserError(
            f"{path}: is a pickled file, and reading one can run any code in it; save it as safetensors where you "
            "trust it"
        )
    try:
        with safe_open(path, "pt") as handle:
            metadata = handle.metadata() or {}
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    except (SafetensorError, OSError, struct.error) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: cannot be read as safetensors ({reason}); it is damaged or another format") from error
    if "subject_diffusion" not in metadata:
        return _learned_embeds(path, tensors)
    header = json.loads(metadata["subject_diffusion"])
    if header.get("format") != FORMAT or header.get("version", 0) > FORMAT_VERSION:
        raise UserError(
            f"{path}: {header.get('format')} version {header.get('version')}; this program reads {FORMAT} up to "
            f"version {FORMAT_VERSION}"
        )
    preview = tensors.pop(PREVIEW, None)
    fields = {name: header[name] for name in ("method", "base", "fingerprint", "words", "settings", "steps")}
    references = _references(path, tensors)
    shown = None if preview is None else preview.numpy()
    return Refinement(**fields, tensors=tensors, preview=shown, references=references, path=path)


def rename_placeholders(refinement: Refinement, names: Sequence[tuple[str, str]]) -> Refinement:
    """The refinement with other placeholders, (from, to) each, so that two files with the same word go together.

    Raises:
        UserError: it has no such placeholder, or two would be called alike.
    """
    words, references = dict(refinement.words), dict(refinement.references)
    for old, new in names:
        if old not in words:
            raise UserError(f"{refinement.label}: has no placeholder {old!r}; it has {', '.join(words) or 'none'}")
        if new in words and new != old:
            raise UserError(f"{refinement.label}: {old}>{new}: {new!r} is taken; give another word")
        words = {
            new if name == old else name: value | {"name": value.get("name", name)} for name, value in words.items()
        }
        references = {new if name == old else name: cutouts for name, cutouts in references.items()}
    return replace(refinement, words=words, references=references)


def preview_picture(refinement: Refinement) -> Image.Image | None:
    """The preview as a picture."""
    return None if refinement.preview is None else Image.fromarray(refinement.preview)


def _references(path: Path, tensors: dict[str, Tensor]) -> dict[str, tuple[Image.Image, ...]]:
    """The cut-outs among a file's tensors, which are taken out."""
    found: dict[str, list[Image.Image]] = {}
    for name in sorted(name for name in tensors if name.startswith(f"{REFERENCES}.")):
        word = name.split(".", 2)[2]
        try:
            cutout = Image.open(io.BytesIO(tensors.pop(name).numpy().tobytes())).convert("RGBA")
        except OSError as error:
            raise UserError(f"{path}: the picture {name} in it cannot be read; it is damaged") from error
        found.setdefault(word, []).append(cutout)
    return {word: tuple(cutouts) for word, cutouts in found.items()}


def _learned_embeds(path: Path, tensors: dict[str, Tensor]) -> Refinement:
    """A textual-inversion file: placeholder -> (D,) or (K, D), as diffusers and most programs write it."""
    if not tensors or any(value.dim() not in (1, 2) for value in tensors.values()):
        raise UserError(
            f"{path}: neither a refinement nor a textual-inversion file (one vector or (K, D) a placeholder); "
            f"it holds {', '.join(sorted(tensors)[:3]) or 'nothing'}"
        )
    words = {name: {"vectors": value.shape[0] if value.dim() == 2 else 1} for name, value in tensors.items()}
    rows = {f"words.{name}": value.reshape(-1, value.shape[-1]).float() for name, value in tensors.items()}
    return Refinement("textual-inversion", "unknown", "", words, rows, path=path)
