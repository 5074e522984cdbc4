"""Conditions of a few pictures at tiny size: random features, prompts from the tiny tokenizer."""

from __future__ import annotations

import torch
from transformers import CLIPTokenizer

from model.inputs import SubjectInputs
from model.prompt import build_prompt, encode_ids
from tests.model.tiny_tokenizer import tiny_tokenizer

POOLED, PATCHES, PATCH_WIDTH = 20, 4, 12


def tiny_inputs(
    captions: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("a dog next to a mug", ("dog", "mug")),
        ("a teddy bear in the snow", ("teddy bear",)),
    ),
    num_references: int = 2,
    max_length: int = 32,
    tokenizer: CLIPTokenizer | None = None,
) -> SubjectInputs:
    """One row a (caption, nouns) pair; padding as the trainer and the pipeline make it."""
    tokenizer = tokenizer or tiny_tokenizer(max_length)
    generator = torch.Generator().manual_seed(0)
    prompts = [build_prompt(tokenizer, caption, nouns) for caption, nouns in captions]
    rows, subjects = len(prompts), max(len(prompt.noun_ids) for prompt in prompts)
    pieces = max((len(ids) for prompt in prompts for ids in prompt.noun_ids), default=1)
    positions = torch.full((rows, subjects), -1)
    noun_ids = torch.full((rows, subjects, pieces), -1)
    for row, prompt in enumerate(prompts):
        for subject, ids in enumerate(prompt.noun_ids):
            positions[row, subject] = prompt.placeholder_positions[subject]
            noun_ids[row, subject, : len(ids)] = torch.tensor(ids)
    keep = positions >= 0
    corners = torch.rand(rows, subjects, 2, 2, generator=generator).sort(dim=2).values
    return SubjectInputs(
        input_ids=torch.stack([prompt.input_ids for prompt in prompts]),
        plain_input_ids=torch.stack([prompt.plain_input_ids for prompt in prompts]),
        empty_input_ids=encode_ids(tokenizer, "").expand(rows, -1).clone(),
        placeholder_positions=positions,
        noun_ids=noun_ids,
        pooled=torch.randn(rows, subjects, POOLED, generator=generator) * keep[..., None],
        patches=torch.randn(rows, subjects, num_references, PATCHES, PATCH_WIDTH, generator=generator)
        * keep[..., None, None, None],
        reference_keep=keep[..., None].expand(-1, -1, num_references).clone(),
        subject_keep=keep,
        boxes=corners.flatten(2) * keep[..., None],
        location_keep=torch.ones(rows, dtype=torch.bool),
        strength=torch.ones(rows, subjects),
    )
