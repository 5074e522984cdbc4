"""What stands beside a picture in text: the alt text, and the JSON of img2dataset or of a person.

Both are untrusted: any encoding, any nesting, any type in any place. What does not fit is left out or refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.sources.files import FileRefused

MAX_TEXT_BYTES = 1_000_000  # of a caption or a JSON file
MAX_SCORES = 32

# Names of columns and keys, as data sets write them, in lower case.
URL_NAMES = ("url",)
TEXT_NAMES = ("caption", "text", "alt_text")
SCORE_NAMES = {
    "similarity": ("similarity", "clip_similarity"),
    "punsafe": ("punsafe",),
    "pwatermark": ("pwatermark",),
    "aesthetic": ("aesthetic", "aesthetic_score"),
}


@dataclass(frozen=True)
class Metadata:
    """What the JSON beside a picture says."""

    alt_text: str = ""
    url: str | None = None
    sha256: str = ""  # of the picture's bytes before a downloader changed them
    scores: Mapping[str, float] = field(default_factory=dict)
    failure: str = ""  # why the downloader has no picture
    entities: Any = None  # not yet checked


def clean_text(text: str) -> str:
    """One line of valid Unicode."""
    return " ".join(text.encode("utf-8", "replace").decode().replace("\0", " ").split())


def read_text(data: bytes) -> str:
    """A caption file's text; letters that are no UTF-8 become replacement characters."""
    return clean_text(data.decode("utf-8-sig", "replace"))


def read_metadata(data: bytes, name: str) -> Metadata:
    """The JSON of `name`.

    Raises:
        FileRefused: it is no JSON object.
    """
    try:
        content = json.loads(data.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError) as error:
        raise FileRefused("bad_metadata", f"{name}: no JSON ({error})") from error
    if not isinstance(content, dict):
        raise FileRefused("bad_metadata", f"{name}: expected an object, found a {type(content).__name__}")
    values = {key.lower(): value for key, value in content.items()}
    sha256 = str(values.get("sha256") or "").lower()
    status = values.get("status")
    return Metadata(
        alt_text=clean_text(_first(values, TEXT_NAMES)),
        url=clean_text(_first(values, URL_NAMES)) or None,
        sha256=sha256 if re.fullmatch(r"[0-9a-f]{64}", sha256) else "",
        scores=_scores(values),
        failure="" if status in (None, "success") else clean_text(f"{status}: {values.get('error_message')}"),
        entities=values.get("entities"),
    )


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((values[name] for name in names if isinstance(values.get(name), str)), "")


def _scores(values: Mapping[str, Any]) -> dict[str, float]:
    """The known scores under their usual names, and those of an inner object "scores" as they are called there."""
    inner = values.get("scores")
    found: dict[str, Any] = dict(list(inner.items())[:MAX_SCORES]) if isinstance(inner, dict) else {}
    for score, names in SCORE_NAMES.items():
        if given := [values[name] for name in names if name in values]:
            found[score] = given[0]
    return {clean_text(name)[:64]: float(value) for name, value in found.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
