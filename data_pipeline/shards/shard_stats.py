"""`NAME_stats.json`: what a finished shard holds, with size and hash of its files. Written last; no times in it.

It ends with the hash of itself, so that damage to it is found like damage to the files it names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from data_pipeline.errors import UserError
from data_pipeline.shards.record_json import plain_text

STATS_VERSION = 1


@dataclass(frozen=True)
class FileFacts:
    """A file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardStats:
    """What one shard holds."""

    name: str
    read: int  # samples that the source gave
    kept: int
    dropped: Mapping[str, int]  # reason -> samples
    entities: int  # of the samples kept
    nouns: Mapping[str, int]  # noun -> entities
    files: Mapping[str, FileFacts]  # NAME.tar, NAME.parquet
    facts: Mapping[str, Any] = field(default_factory=dict)  # what all shards of a build share: configuration hash …
    stats_version: int = STATS_VERSION


_STATS = TypeAdapter(ShardStats)


def stats_to_json(stats: ShardStats) -> str:
    """The file's text: sorted keys, one a line, the hash of all others as `sha256_of_the_rest`."""
    values = asdict(stats)
    return _text({**values, "sha256_of_the_rest": _hash(values)})


def stats_from_json(text: str | bytes, where: str) -> ShardStats:
    """Read a stats file back.

    Raises:
        UserError: it is not one, or not as it was written.
    """
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"found a {type(values).__name__}")
        told = values.pop("sha256_of_the_rest", None)
        stats = _STATS.validate_json(json.dumps(values), strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{where}: {key}: {first['msg']}; delete this file and run the build again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not a stats file ({error}); delete it and run the build again") from error
    if stats.stats_version != STATS_VERSION:
        raise UserError(f"{where}: stats_version={stats.stats_version}: this program reads {STATS_VERSION}")
    plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    if told != _hash(values) or plain != _text({**values, "sha256_of_the_rest": told}):
        raise UserError(f"{where}: not as it was written (its own hash differs); delete it and run the build again")
    return stats


def _text(values: Mapping[str, Any]) -> str:
    return plain_text(json.dumps(values, sort_keys=True, ensure_ascii=False, indent=1, allow_nan=False)) + "\n"


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(values).encode()).hexdigest()
