"""Changed weights of a base as a file holds them, and back: in full, as a low-rank change, or as a change in fp16.

    NAME            the weight itself, float32
    NAME.up, .down  W - W0 = up down, of its largest singular values (Custom Diffusion, arXiv 2212.04488, section 4.4)
    NAME.delta, .scale   W - W0 = scale delta, delta fp16
NAME is `unet.…` or `text_encoder.…`. A change in fp16 keeps 11 bits of the change; a weight in fp16 would keep 11 bits
of the weight, which is a hundred times larger, and lose much of what was learnt.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from infer.pipeline import SubjectDiffusionPipeline
from infer.refine.refinement import Refinement

ROUNDING = 1e-6  # singular values below this share of the largest are none
Weights = dict[str, Tensor]  # by name, `unet.…` or `text_encoder.…`


def low_rank(delta: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The largest singular values of a change, as many as together make up at most `share` of the sum of all.

    Args:
        delta: (O, I).
        share: 0..1; at least one value is kept.
    Returns:
        U diag(s) (O, r) and V (r, I).
    """
    left, values, right = torch.linalg.svd(delta.float(), full_matrices=False)
    kept = (values.cumsum(0) <= share * values.sum() * (1 + 1e-6)) & (values > ROUNDING * values[0])
    rank = max(1, int(kept.sum()))
    return left[:, :rank] * values[:rank], right[:rank]


def packed_low_rank(start: Weights, now: Weights, share: float) -> Weights:
    """Matrices as low-rank changes, all else in full."""
    packed: Weights = {}
    for name, value in now.items():
        if value.dim() == 2:
            up, down = low_rank(value - start[name].to(value), share)
            packed |= {f"{name}.up": up.cpu().contiguous(), f"{name}.down": down.cpu().contiguous()}
        else:
            packed[name] = value.cpu().clone()
    return packed


def packed_half(start: Weights, now: Weights) -> Weights:
    """Changes in fp16, each scaled to at most 1: unscaled, small ones would fall below what fp16 can tell apart."""
    packed: Weights = {}
    for name, value in now.items():
        delta = value.detach().float().cpu() - start[name].float()
        scale = delta.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        packed |= {f"{name}.delta": (delta / scale).half(), f"{name}.scale": scale}
    return packed


def restored(refinement: Refinement, base: Mapping[str, Tensor]) -> Weights:
    """The weights of a file on a base, in float32 on the CPU.

    Args:
        base: the weights it was made on.
    Raises:
        UserError: they do not fit this base, or a part of them is missing.
    """
    tensors = {name: value for name, value in refinement.tensors.items() if not name.startswith("words.")}
    weights: Weights = {}
    for name, value in tensors.items():
        stem, _, kind = name.rpartition(".")
        if kind in ("down", "scale"):
            continue
        target = stem if kind in ("up", "delta") else name
        partner = {"up": f"{stem}.down", "delta": f"{stem}.scale"}.get(kind)
        if target not in base or (partner is not None and partner not in tensors):
            raise UserError(f"{refinement.label}: {name} has no place in this base; it is damaged, or of another base")
        start = base[target].detach().float().cpu()
        if kind == "up":
            found = value.float() @ tensors[f"{stem}.down"].float()
        else:
            found = value.float() * tensors[f"{stem}.scale"] if kind == "delta" else value.float()
        if found.shape != start.shape:
            raise UserError(
                f"{refinement.label}: {target} is {tuple(found.shape)}, this base has {tuple(start.shape)}; draw with "
                f"{refinement.base}"
            )
        weights[target] = found if partner is None else start + found
    return weights


def base_weights(pipeline: SubjectDiffusionPipeline) -> Weights:
    """The parameters of UNet and text encoder by name; no copies."""
    unet = {f"unet.{name}": value for name, value in pipeline.unet.named_parameters()}
    return unet | {f"text_encoder.{name}": value for name, value in pipeline.text_encoder.named_parameters()}


@torch.no_grad()
def put_weights(pipeline: SubjectDiffusionPipeline, weights: Weights) -> None:
    """Copy weights into the pipeline's UNet and text encoder, in their own precision."""
    targets = base_weights(pipeline)
    for name, value in weights.items():
        targets[name].copy_(value)
