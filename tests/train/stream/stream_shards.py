"""Small real shards for the stream, and settings that name them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.shards.writer import write_shard
from tests.data_pipeline.shards.small_shards import FACTS, sample
from train.settings import DataSettings
from train.stream import Layout, Stream, StreamSample, open_stream


def write_shards(folder: str | Path, sizes: Sequence[int], *, first: int = 0) -> str:
    """Shards 00000, 00001 … of so many samples; keys tell shard and row: `s00001_000007`."""
    for number, size in enumerate(sizes, start=first):
        name = f"{number:05d}"
        write_shard(folder, name, [sample(row, prefix=f"s{name}_") for row in range(size)], FACTS)
    return os.fspath(folder)


def data_of(scratch: Path, **options: Any) -> DataSettings:
    """`shards={name: {…}}` and other keys of the section."""
    return DataSettings.model_validate({"scratch": scratch, **options})


def stream_of(folder: str, scratch: Path, layout: Layout, split: Any = "train", **options: Any) -> Stream:
    """One source, `pictures`."""
    return open_stream(data_of(scratch, shards={"pictures": {"folder": folder}}, **options), split, layout)


def keys(stream: Stream, numbers: Any) -> list[str]:
    """Keys of samples, toybox scenes as `toybox/n`."""
    return [stream[number].key for number in numbers]


def sample_of(stream: Stream, number: int) -> StreamSample:
    """A sample that must come from a shard."""
    found = stream[number]
    assert isinstance(found, StreamSample)
    return found
