"""Tiles of the validation pictures: what was asked for, what was drawn, and where the supervised tokens look.

Two small tiles a subject: the real picture lit by the subject's attention, and lit by its mask, so that one glance
compares them. All tiles come at one display size, whatever the size of the pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from train.pictures import save_grid

TILE = 192  # pixels, side of a tile
MAP_SIDE = 16  # tokens, side of the attention maps shown where there are such
DARK = 0.2  # brightness of what is not lit


def attention_overview(maps: Mapping[str, Tensor]) -> Tensor:
    """Mean over heads and over the recorded layers of 16 x 16 tokens, or else of the finest: (B, S, h, w).

    Args:
        maps: layer name -> (B, heads, S, Q), from a recorder; square pictures.
    """
    sizes = {values.shape[-1] for values in maps.values()}
    chosen = MAP_SIDE**2 if MAP_SIDE**2 in sizes else max(sizes)
    layers = [values.float().mean(dim=1) for values in maps.values() if values.shape[-1] == chosen]  # (B, S, Q)
    side = round(chosen**0.5)
    return torch.stack(layers).mean(dim=0).unflatten(-1, (side, side))


def attention_by_mask(attention: Tensor, masks: Tensor, named: Tensor) -> tuple[Tensor, Tensor]:
    """Mean attention inside and outside the masks, over subjects: two scalars, NaN without any subject.

    Args:
        attention: (B, S, h, w).
        masks: (B, S, M, M) 0..1.
        named: (B, S) bool, subjects that the prompt names.
    """
    inside = functional.interpolate(masks.float(), size=attention.shape[-2:], mode="area")  # (B, S, h, w)
    means = []
    for weights in (inside, 1 - inside):
        per_subject = (attention * weights).sum(dim=(2, 3)) / weights.sum(dim=(2, 3)).clamp(min=1e-6)  # (B, S)
        means.append(torch.where(named, per_subject, 0).sum() / named.sum())
    return means[0], means[1]


def subject_tiles(pictures: Tensor, attention: Tensor, masks: Tensor, named: Tensor) -> list[list[Tensor]]:
    """For each row its tiles (3, TILE, TILE), two subjects a tile, each attention beside mask; absent ones stay white.

    Args:
        pictures: (B, 3, H, W) in 0..1.
        attention: (B, S, h, w); each map is shown relative to its own maximum.
        masks: (B, S, M, M) 0..1.
        named: (B, S) bool.
    """
    half = TILE // 2
    small = functional.interpolate(pictures.float(), size=(half, half), mode="area")  # (B, 3, half, half)
    relative = attention / attention.amax(dim=(2, 3), keepdim=True).clamp(min=1e-12)
    rows = []
    for row, picture in enumerate(small):
        tiles = []
        for first in range(0, named.shape[1], 2):
            tile = torch.ones(3, TILE, TILE, device=pictures.device)
            for place, subject in enumerate(range(first, min(first + 2, named.shape[1]))):
                if named[row, subject]:
                    top = slice(place * half, (place + 1) * half)
                    tile[:, top, :half] = _lit(picture, relative[row, subject])
                    tile[:, top, half:] = _lit(picture, masks[row, subject].float())
            tiles.append(tile)
        rows.append(tiles)
    return rows


def write_grid(cells: Sequence[Sequence[Tensor]], captions: Sequence[str], path: Path) -> None:
    """Samples two a line, each its cells (3, H, W) in 0..1 of any size, captions below."""
    tiles = [[_tile(cell) for cell in row] for row in cells]
    lines = [[tile for row in tiles[y : y + 2] for tile in row] for y in range(0, len(tiles), 2)]
    both = [" | ".join(captions[y : y + 2]) for y in range(0, len(tiles), 2)]
    save_grid(lines, path, captions=both, scale=1)


def _tile(picture: Tensor) -> Tensor:
    """Small pictures keep their pixels visible, large ones are averaged down."""
    mode = "nearest-exact" if picture.shape[-1] <= TILE else "area"
    return functional.interpolate(picture.detach().float().cpu()[None], size=(TILE, TILE), mode=mode)[0]


def _lit(picture: Tensor, light: Tensor) -> Tensor:
    """(3, H, W) and (h, w) in 0..1 -> (3, H, W), dark where there is no light."""
    spread = functional.interpolate(light[None, None], size=picture.shape[1:], mode="bilinear")[0]  # (1, H, W)
    return picture * (DARK + (1 - DARK) * spread.clamp(0, 1))
