"""Encoded scenes -> one batch of the denoising tasks: latents, conditions, masks and the tokens that are supervised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from model.inputs import SubjectInputs
from model.prompt import SubjectPrompt, build_prompt, encode_ids, supervised_weights
from train.feature_cache import MASK_SIZE, EncodedScene

REFERENCE_SHARES = (0.6, 0.25, 0.15)  # of batches with at most 1, 2, 3 references a subject


@dataclass(frozen=True)
class DiffusionBatch:
    """B pictures with up to S subjects."""

    latents: Tensor  # (B, C, h, w) scaled
    inputs: SubjectInputs  # with every reference
    pooled_each: Tensor  # (B, S, R, P) pooled vector of each reference
    masks: Tensor  # (B, S, MASK_SIZE, MASK_SIZE) 0..1
    supervised: Tensor  # (B, S, L) averaging weights over prompt positions


def diffusion_batch(
    scenes: Sequence[EncodedScene], tokenizer: CLIPTokenizer, supervise: Sequence[str], device: torch.device
) -> DiffusionBatch:
    """Pad scenes to a common number of subjects and references; captions of too long prompts are shortened."""
    prompts = [build_prompt(tokenizer, s.caption, s.nouns, spans=s.spans, shorten=True) for s in scenes]
    rows, subjects = len(scenes), max(1, *(len(s.nouns) for s in scenes))
    references = max(1, *(max(s.reference_counts, default=0) for s in scenes))
    tokens, width = scenes[0].patches.shape[1:]
    pooled = torch.zeros(rows, subjects, references, scenes[0].pooled.shape[1])
    patches = torch.zeros(rows, subjects, references, tokens, width)
    reference_keep = torch.zeros(rows, subjects, references, dtype=torch.bool)
    boxes = torch.zeros(rows, subjects, 4)
    masks = torch.zeros(rows, subjects, MASK_SIZE, MASK_SIZE)
    for row, scene in enumerate(scenes):
        start = 0
        for slot, count in enumerate(scene.reference_counts):
            pooled[row, slot, :count] = scene.pooled[start : start + count].float()
            patches[row, slot, :count] = scene.patches[start : start + count].float()
            reference_keep[row, slot, :count] = True
            start += count
        boxes[row, : len(scene.nouns)] = scene.boxes
        masks[row, : len(scene.nouns)] = scene.masks.float()
    inputs = SubjectInputs(
        input_ids=torch.stack([prompt.input_ids for prompt in prompts]),
        plain_input_ids=torch.stack([prompt.plain_input_ids for prompt in prompts]),
        empty_input_ids=encode_ids(tokenizer, "").expand(rows, -1).clone(),
        placeholder_positions=_padded([p.placeholder_positions for p in prompts], subjects),
        noun_ids=_padded_ids(prompts, subjects),
        pooled=_mean_of_kept(pooled, reference_keep),
        patches=patches,
        reference_keep=reference_keep,
        subject_keep=reference_keep.any(dim=2),
        boxes=boxes,
        location_keep=torch.ones(rows, dtype=torch.bool),
        strength=torch.ones(rows, subjects),
    )
    return DiffusionBatch(
        latents=torch.stack([scene.latents for scene in scenes]).float().to(device),
        inputs=inputs.to(device),
        pooled_each=pooled.to(device),
        masks=masks.to(device),
        supervised=supervised_weights(prompts, subjects, supervise).to(device),
    )


def draw_references(batch: DiffusionBatch, generator: torch.Generator) -> SubjectInputs:
    """The conditions with at most 1, 2 or 3 references a subject, one draw a batch in `REFERENCE_SHARES`.

    Padding costs as much as references do, so a batch with few of them is a quick one.
    """
    count = 1 + int(torch.multinomial(torch.tensor(REFERENCE_SHARES), 1, generator=generator))
    keep = batch.inputs.reference_keep[:, :, :count]
    return replace(
        batch.inputs,
        pooled=_mean_of_kept(batch.pooled_each[:, :, :count], keep),
        patches=batch.inputs.patches[:, :, :count],
        reference_keep=keep,
    )


def _mean_of_kept(pooled: Tensor, keep: Tensor) -> Tensor:
    """(B, S, R, P) and (B, S, R) -> (B, S, P)."""
    return (pooled * keep[..., None]).sum(dim=2) / keep.sum(dim=2, keepdim=True).clamp(min=1)


def _padded(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])


def _padded_ids(prompts: Sequence[SubjectPrompt], subjects: int) -> Tensor:
    longest = max((len(ids) for prompt in prompts for ids in prompt.noun_ids), default=1)
    return torch.stack(
        [_padded([*p.noun_ids, *[()] * (subjects - len(p.noun_ids))], longest) for p in prompts]
    )  # (B, S, K)
