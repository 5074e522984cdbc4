"""Encoded scenes -> one batch of the denoising tasks: latents, conditions, masks and the tokens that are supervised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from model.inputs import SubjectInputs
from model.prompt import SubjectPrompt, build_prompt, encode_ids, supervised_weights
from train.feature_cache import MASK_SIZE, EncodedScene


@dataclass(frozen=True)
class DiffusionBatch:
    """B pictures with up to S subjects."""

    latents: Tensor  # (B, C, h, w) scaled
    inputs: SubjectInputs
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
    pooled = torch.zeros(rows, subjects, scenes[0].pooled.shape[1])
    patches = torch.zeros(rows, subjects, references, tokens, width)
    reference_keep = torch.zeros(rows, subjects, references, dtype=torch.bool)
    boxes = torch.zeros(rows, subjects, 4)
    masks = torch.zeros(rows, subjects, MASK_SIZE, MASK_SIZE)
    for row, scene in enumerate(scenes):
        start = 0
        for slot, count in enumerate(scene.reference_counts):
            pooled[row, slot] = scene.pooled[start : start + count].float().mean(dim=0)
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
        pooled=pooled,
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
        masks=masks.to(device),
        supervised=supervised_weights(prompts, subjects, supervise).to(device),
    )


def _padded(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows])


def _padded_ids(prompts: Sequence[SubjectPrompt], subjects: int) -> Tensor:
    longest = max((len(ids) for prompt in prompts for ids in prompt.noun_ids), default=1)
    return torch.stack(
        [_padded([*p.noun_ids, *[()] * (subjects - len(p.noun_ids))], longest) for p in prompts]
    )  # (B, S, K)
