"""Where pictures come from. A source is cut into units; a unit becomes one shard, so it is also what is done or not.

Units depend on the settings and on what lies in the source only, never on time or on who asks: a killed build that
starts again finds the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from data_pipeline.record import BoxPx, Drop


@dataclass(frozen=True)
class GivenEntity:
    """A thing that the source itself knows the place of (OpenImages, a rendered scene): not searched again."""

    noun: str
    box_xyxy_px: BoxPx  # pixels of the source's picture as it is shown: turned as its EXIF says
    mask_png: bytes | None = None  # one channel, size of the picture, nonzero inside; None: the segmenter makes it
    phrase: str = ""  # looked for in the caption; the noun by default
    subject_id: str | None = None
    references: tuple[bytes, ...] = ()  # RGBA PNG cut-outs


@dataclass(frozen=True)
class SourceSample:
    """One picture as the source gives it, not yet decoded."""

    key: str  # unique in the source, [A-Za-z0-9_-]+, kept to the end
    image: bytes  # encoded, any format
    alt_text: str = ""
    url: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    given: tuple[GivenEntity, ...] | None = None  # None: nouns, detector and segmenter find them
    sha256: str = ""  # of the picture before a downloader changed its bytes; "": that of `image`


@dataclass(frozen=True)
class Unit:
    """A part of the source that becomes one shard."""

    name: str  # "00017": name of the shard's files, without suffix
    count: int | None  # samples, None: not known before reading
    parts: Mapping[str, Any]  # what the source needs to read it; plain JSON values


class Source(Protocol):
    """A collection of pictures."""

    def units(self) -> list[Unit]:
        """All units, in order."""
        ...

    def samples(self, unit: Unit) -> Iterator[SourceSample | Drop]:
        """The unit's pictures, in order; what cannot be read is a `Drop` with its reason, never an exception."""
        ...
