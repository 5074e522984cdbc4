"""Seeded random numbers by key: what an epoch, a window or a block of the stream draws depends on its name alone."""

from __future__ import annotations

import hashlib

import numpy as np


def name_number(name: str) -> int:
    """A name as 64 bits."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def generator(*key: int | str) -> np.random.Generator:
    """A generator whose seed is a hash of `key`."""
    return np.random.default_rng([name_number(part) if isinstance(part, str) else part % 2**64 for part in key])
