"""Masks as COCO's compressed run lengths: written by pycocotools, read back by ourselves.

pycocotools trusts the text that it decodes; a shard may come from anywhere, so the runs are checked first, and once
they are known the mask is a single `np.repeat`. Format: cocoapi, `common/maskApi.c`, rleToString.
"""

from __future__ import annotations

import numpy as np

from data_pipeline.record import MaskRle

MAX_DIGITS = 7  # 5 bits each: a run of up to 2**34 pixels


def encode_mask(mask: np.ndarray) -> MaskRle:
    """The run lengths of a mask, (H, W) bool."""
    from pycocotools import mask as coco

    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"expected a mask (H, W) of bool, got {mask.shape} of {mask.dtype}")
    coded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return MaskRle((int(mask.shape[0]), int(mask.shape[1])), coded["counts"].decode("ascii"))


def run_lengths(mask: MaskRle) -> np.ndarray:
    """Lengths of the runs down the columns, outside and inside in turn, (R,) int64.

    Raises:
        ValueError: the text is not such a list, or its runs do not fill the picture.
    """
    height, width = mask.size
    if height < 1 or width < 1:
        raise ValueError(f"size {height} x {width} is no picture")
    codes = np.frombuffer(mask.counts.encode("ascii", "replace"), dtype=np.uint8).astype(np.int64) - 48  # (N,)
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("counts are not COCO's compressed run lengths")
    ends = np.flatnonzero(~codes & 32)  # (R,) last digit of each number
    starts = np.concatenate([[0], ends[:-1] + 1])
    digits = ends - starts + 1
    if digits.max() > MAX_DIGITS:
        raise ValueError("counts hold a number that is too large")
    place = np.arange(len(codes)) - np.repeat(starts, digits)
    numbers = np.add.reduceat((codes & 31) << (5 * place), starts)
    numbers -= np.where(codes[ends] & 16, 1 << (5 * digits), 0)  # the top bit is the sign
    # From the fourth number on, each is the difference from the one before the last.
    runs = numbers.copy()
    runs[1::2] = np.cumsum(numbers[1::2])
    runs[2::2] = np.cumsum(numbers[2::2])
    if runs.min() < 0 or runs.sum() != height * width:
        raise ValueError(f"runs do not fill {height} x {width} pixels")
    return runs


def mask_area(mask: MaskRle) -> int:
    """Number of pixels inside.

    Raises:
        ValueError: as `run_lengths`.
    """
    return int(run_lengths(mask)[1::2].sum())


def decode_mask(mask: MaskRle) -> np.ndarray:
    """The mask, (H, W) bool.

    Raises:
        ValueError: as `run_lengths`.
    """
    height, width = mask.size
    runs = run_lengths(mask)
    inside = np.arange(len(runs)) % 2 == 1
    return np.ascontiguousarray(np.repeat(inside, runs).reshape(width, height).T)
