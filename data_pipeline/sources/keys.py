"""Keys of samples: readable, unique in the source, the same each time; made from the paths that the source gives.

A key names members of a tar, so it holds `A-Z a-z 0-9 _ -` only (webdataset ends a key at the first dot).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

MAX_LENGTH = 100  # with a hash behind it a name still fits a tar header


def clean_key(name: str) -> str:
    """`name` in the letters a key may have: "Más fotos/cat 1" becomes "Mas_fotos_cat_1"."""
    plain = unicodedata.normalize("NFKD", name)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return re.sub(r"[^A-Za-z0-9_-]+", "_", plain).strip("_")[:MAX_LENGTH] or "picture"


def name_hash(name: str, length: int = 8) -> str:
    """The first letters of the name's SHA-256; names need not be valid Unicode."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:length]


def faithful_key(name: str) -> str:
    """`clean_key`, with a hash behind it where letters were lost: for names that are met one by one."""
    key = clean_key(name)
    return key if key == name else f"{key}-{name_hash(name)}"


def unique_keys(names: Sequence[str], paths: Sequence[str]) -> list[str]:
    """A key for each name; all that would share one get a hash of their path, which is unique.

    Adding a file changes other keys only where its own collides with theirs.
    """
    cleaned = [clean_key(name) for name in names]
    keys = cleaned
    for length in (8, 16, 32, 64):  # longer ones if somebody's file is called like another one's hashed key
        counts = Counter(keys)
        if len(counts) == len(keys):
            break
        keys = [
            key if counts[key] == 1 else f"{clean}-{name_hash(path, length)}"
            for key, clean, path in zip(keys, cleaned, paths, strict=True)
        ]
    return keys
