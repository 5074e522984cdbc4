"""Validation pictures: rows of tensors, or of tensors and captions, laid out as one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def to_uint8(picture: Tensor) -> np.ndarray:
    """(3, H, W) or (1, H, W) in 0..1 -> (H, W, 3) uint8."""
    array = (picture.detach().float().clamp(0, 1).cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array


def save_grid(rows: Sequence[Sequence[Tensor]], path: Path, *, captions: Sequence[str] = (), scale: int = 2) -> None:
    """Write rows of (3, H, W) pictures in 0..1, each row with an optional caption below it, as one PNG."""
    cell = rows[0][0].shape[-1] * scale
    gap, text_height = 4, 18 if captions else 0
    width = max(len(row) for row in rows) * (cell + gap) + gap
    sheet = Image.new("RGB", (width, len(rows) * (cell + gap + text_height) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for y, row in enumerate(rows):
        top = gap + y * (cell + gap + text_height)
        for x, picture in enumerate(row):
            tile = Image.fromarray(to_uint8(picture)).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(tile, (gap + x * (cell + gap), top))
        if captions:
            draw.text((gap + 2, top + cell + 1), captions[y][: width // 6], fill="black", font=font)
    sheet.save(path)
