"""Regularisation by real pictures: those of the dataset builder's shards whose captions are nearest to the class.

Custom Diffusion, arXiv 2212.04488, section 3.1: 200 pictures whose captions are at least 0.85 similar to "photo of a
dog" in CLIP's text space. Captions are read from the tables beside the shards, pictures only where they are chosen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from data_pipeline.errors import UserError
from data_pipeline.settings import Settings
from infer.refine.method import Concept, RefineBase
from infer.refine.prompts import fill
from infer.refine.regularisation.picture_set import CaptionedPicture, PictureSet
from model.base_loading import SHIPPED

if TYPE_CHECKING:
    from data_pipeline.shards.reader import FinishedShard
    from data_pipeline.stages.detect.clip_folder import LoadedClip

OWN_CLIP = "region_clip"  # beside a shipped model: its own towers with heads that join them
BATCH = 256  # captions


class _Found(NamedTuple):
    """A caption near to the class."""

    similarity: float
    shard: FinishedShard
    key: str
    caption: str


class ShardsRegularisation(Settings):
    """Real pictures of the class."""

    kind: Literal["shards"] = "shards"
    folder: str  # of finished shards: a path or a URL
    count: int = Field(200, gt=0)  # at most
    similarity: float = Field(0.85, ge=-1, le=1)  # least cosine of caption and query in CLIP's text space
    query: str = Field("photo of a {}", pattern=r"^[^{}]*\{\}[^{}]*$")  # {}: the class word
    clip: str | None = None  # open_clip folder, hub id or ARCHITECTURE/TAG; null: the subject model's own

    def open(self, base: RefineBase, concept: Concept, size: int) -> PictureSet:
        """Choose the pictures, the most similar first, and read them.

        Raises:
            UserError: no shards, no CLIP that compares texts, no caption that is near enough.
        """
        shards = _shards(self.folder)
        clip = _open_clip(self.clip or _own_clip(base), base.pipeline.unet.device)
        query = fill(self.query, concept.class_word)
        near, highest = self._nearest(shards, clip, query)
        if not near:
            raise UserError(
                f"regularisation.folder={self.folder}: no caption is {self.similarity} similar to {query!r}, the "
                f"nearest is {highest:.2f}; lower regularisation.similarity, or take kind=generated"
            )
        if len(near) < self.count:
            print(
                f"regularisation: {len(near)} of {self.count} pictures, no more captions in {self.folder} are "
                f"{self.similarity} similar to {query!r}"
            )
        return PictureSet(list(_read(near)), size)

    def _nearest(self, shards: Sequence[FinishedShard], clip: LoadedClip, query: str) -> tuple[list[_Found], float]:
        """The captions that count, the most similar first, and the similarity of the nearest of all."""
        wanted = _text_vectors(clip, [query])[0]  # (P,)
        near: list[_Found] = []
        highest = -1.0
        for shard in shards:
            rows = list(_captions(shard))
            for first in range(0, len(rows), BATCH):
                part = rows[first : first + BATCH]
                similar = (_text_vectors(clip, [caption for _, caption in part]) @ wanted).tolist()
                highest = max([highest, *similar])
                near += [
                    _Found(value, shard, key, caption)
                    for value, (key, caption) in zip(similar, part, strict=True)
                    if value >= self.similarity
                ]
            near = sorted(near, key=lambda found: (-found.similarity, found.shard.name, found.key))[: self.count]
        return near, highest


def _shards(folder: str) -> list[FinishedShard]:
    from data_pipeline.shards.reader import list_shards

    shards = list_shards(folder)
    if not shards:
        raise UserError(f"regularisation.folder={folder}: no finished shards there; give what `data` built")
    return shards


def _captions(shard: FinishedShard) -> Iterator[tuple[str, str]]:
    """Keys and captions of a shard."""
    from data_pipeline.shards.metadata_table import KEPT, table_rows
    from data_pipeline.shards.storage import split_address, told_in_one_line

    storage, name = split_address(shard.parquet)
    with told_in_one_line(shard.parquet, "read"), storage.open(name) as file:
        try:
            for row in table_rows(file):
                if row["status"] == KEPT:
                    yield row["key"], row["caption"]
        except ValueError as error:
            raise UserError(f"{shard.parquet}: cannot be read as a table ({error}); build this shard again") from error


def _read(chosen: Sequence[_Found]) -> Iterator[CaptionedPicture]:
    """The chosen pictures in their order, each shard read once."""
    from data_pipeline.shards.reader import read_shard

    jpegs: dict[tuple[str, str], bytes] = {}
    for shard in sorted({found.shard for found in chosen}, key=lambda shard: shard.name):
        keys = {found.key for found in chosen if found.shard == shard}
        for sample in read_shard(shard.tar):
            if sample.record.key in keys:
                jpegs[shard.name, sample.record.key] = sample.jpeg
    for found in chosen:
        jpeg = jpegs.get((found.shard.name, found.key))
        if jpeg is None:
            raise UserError(f"{found.shard.tar}: {found.key} is in its table, but not in it; build this shard again")
        yield CaptionedPicture(Path(found.shard.name) / f"{found.key}.jpg", found.caption, jpeg)


@torch.no_grad()
def _text_vectors(clip: LoadedClip, texts: Sequence[str]) -> Tensor:
    """Unit vectors (N, P) on the CPU."""
    return clip.clip.encode_text(clip.tokenize(texts).to(clip.mean.device), normalize=True).float().cpu()


def _own_clip(base: RefineBase) -> str:
    name = str(base.pipeline.config.base)
    if re.fullmatch(r"[\w-]+", name) and (SHIPPED / name / OWN_CLIP).is_dir():
        return str(SHIPPED / name / OWN_CLIP)
    raise UserError(
        f"regularisation.clip: {base.name} has no CLIP of its own that reads texts; give an open_clip folder, a hub id "
        "or ARCHITECTURE/TAG, such as ViT-B-32/laion2b_s34b_b79k"
    )


def _open_clip(model: str, device: torch.device) -> LoadedClip:
    from open_clip import get_pretrained_cfg

    from data_pipeline.stages.detect.clip_folder import LoadedClip, read_folder
    from data_pipeline.stages.pretrained import find_pretrained, one_line_errors

    architecture, _, tag = model.partition("/")
    known: dict[str, Any] = {} if Path(model).expanduser().is_dir() else get_pretrained_cfg(architecture, tag)
    found = find_pretrained("regularisation.clip", (known.get("hf_hub") or model).rstrip("/"))
    with one_line_errors(str(found)):
        read = read_folder(found.folder)
    clip = read.clip.to(device).eval().requires_grad_(False)
    return LoadedClip(clip, read.tokenize, read.mean.to(device), read.deviation.to(device))
