"""Small real shards of rendered scenes with references, and settings that name them."""

from __future__ import annotations

import functools
import hashlib
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.record import Entity, Record, Sample
from data_pipeline.shards.masks import encode_mask
from data_pipeline.shards.writer import write_shard
from data_pipeline.toybox.world import ToyboxWorld
from tests.data_pipeline.shards.small_shards import FACTS
from train.settings import DataSettings
from train.stream import Layout, Stream, StreamSample, open_stream

SIDE, REFERENCE_SIDE, SAMPLES_A_SHARD = 80, 48, 40
ALL = {  # filters that keep everything
    "min_area": 0.0, "max_area": 1.0, "min_aspect": 0.01, "max_aspect": 100.0, "min_score": 0.0,
    "min_mask_share": 0.0, "max_overlap": 1.0, "max_white": 1.0,
}  # fmt: skip


@functools.cache
def world() -> ToyboxWorld:
    """What the shards show."""
    return ToyboxWorld("val", size=SIDE, reference_size=REFERENCE_SIDE, min_subjects=1)


def rendered_sample(number: int, *, references: bool = True) -> Sample:
    """Scene `number` of the world as a sample; its key ends in the number."""
    scene, key = world().scene(number), f"scene-{number:04d}"
    entities, pictures = [], {}
    for place, entity in enumerate(scene.entities):
        names = tuple(f"{key}.ref{len(pictures) + i}.png" for i in range(len(entity.references) * references))
        pictures |= {name: _encoded(view, "PNG") for name, view in zip(names, entity.references, strict=False)}
        entities.append(
            Entity(
                id=place, noun=entity.noun, phrase=entity.noun, caption_span=entity.span,
                box_xyxy_px=entity.box_xyxy_px, score=0.9, mask=encode_mask(entity.mask),
                mask_area_px=int(entity.mask.sum()), subject_id=entity.subject.id, references=names,
            )
        )  # fmt: skip
    jpeg = _encoded(scene.image, "JPEG")
    record = Record(
        key=key, sha256=hashlib.sha256(jpeg).hexdigest(), width=SIDE, height=SIDE, caption=scene.caption,
        alt_text="", entities=tuple(entities),
    )  # fmt: skip
    return Sample(record, jpeg, pictures)


def write_scene_shards(folder: Path, shards: int = 2, **options: Any) -> Path:
    """Shards 00000, 00001 … of forty samples each; one in 32 is held for validation."""
    for shard in range(shards):
        numbers = range(shard * SAMPLES_A_SHARD, (shard + 1) * SAMPLES_A_SHARD)
        write_shard(folder, f"{shard:05d}", [rendered_sample(number, **options) for number in numbers], FACTS)
    return folder


@functools.cache
def _kept() -> tempfile.TemporaryDirectory[str]:
    kept = tempfile.TemporaryDirectory()
    write_scene_shards(Path(kept.name))
    return kept


def scene_shards() -> Path:
    """Two shards, written once for all tests; not to be changed."""
    return Path(_kept().name)


def data_of(shards: Path, scratch: Path, **values: Any) -> DataSettings:
    """One source, `pairs`; other keys of the section as they are given."""
    source = {"folder": str(shards), "filters": values.pop("filters", ALL), "nouns": values.pop("nouns", None)}
    plain = {"size": 32, "workers": 0, "scratch": scratch, "shards": {"pairs": source}}
    return DataSettings.model_validate({**plain, **values})


def stream_of(data: DataSettings, **layout: int) -> Stream:
    """The samples that are trained on."""
    return open_stream(data, "train", Layout(**layout))


def samples_of(data: DataSettings, count: int) -> list[StreamSample]:
    """The first samples of the shards alone."""
    stream = stream_of(data)
    found = [stream[number] for number in range(count)]
    assert all(isinstance(sample, StreamSample) for sample in found)
    return found  # type: ignore[return-value]


def _encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return buffer.getvalue()
