"""Scenes -> one batch of the denoising tasks: latents, conditions, masks and the tokens that are supervised.

One path, whether a scene is live (its picture and its references still have to be seen by the frozen models) or comes
encoded from a pool or a cache: `collate_scenes` pads and tokenises on the CPU, where the scenes are loaded, and
`assemble_batch` moves the tensors, runs the frozen models on what is live and puts everything into its place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import CLIPTokenizer

from model.inputs import SubjectInputs
from model.prompt import SubjectPrompt, build_prompt, encode_ids, supervised_weights
from train.data.frozen_encoders import EncodedScene, FrozenEncoders
from train.data.prepared_scenes import PreparedScene
from train.draws import SampleDraws

REFERENCE_SHARES = (0.6, 0.25, 0.15)  # of batches with at most 1, 2, 3 references a subject


@dataclass(frozen=True)
class DiffusionBatch:
    """B pictures with up to S subjects."""

    latents: Tensor  # (B, C, h, w) scaled, mean of the posterior
    inputs: SubjectInputs  # with every reference
    pooled_each: Tensor  # (B, S, R, P) pooled vector of each reference
    masks: Tensor  # (B, S, M, M) 0..1
    supervised: Tensor  # (B, S, L) averaging weights over prompt positions
    latent_std: Tensor | None = None  # (B, C, h, w) of the posterior; None: the latents are taken as they are
    keys: tuple[str, ...] = ()  # B: shard/key, or toybox/number


class CachedRows(NamedTuple):
    """The scenes of a batch that come encoded: N of them with M references."""

    rows: Tensor  # (N,) int64 in the batch
    latents: Tensor  # (N, C, h, w) half
    latent_std: Tensor | None  # (N, C, h, w) half
    places: Tensor  # (M, 3) int64 row, subject, number of the reference
    pooled: Tensor  # (M, P) half
    patches: Tensor  # (M, T, W) half


class LiveRows(NamedTuple):
    """The scenes of a batch that the frozen models have not seen yet: N of them with M references."""

    rows: Tensor  # (N,) int64 in the batch
    pictures: Tensor  # (N, 3, H, H) uint8
    places: Tensor  # (M, 3) int64 row, subject, number of the reference
    frames: Tensor  # (M, 3, h, h) uint8


class CollatedScenes(NamedTuple):
    """A batch on the CPU; tensors in named tuples, which torch's loader pins and accelerate moves by themselves."""

    keys: tuple[str, ...]
    counts: dict[str, int]  # entities kept, and left out by reason
    conditions: dict[str, Tensor]  # the fields of SubjectInputs that no frozen model has a part in
    masks: Tensor  # (B, S, M, M) half
    supervised: Tensor  # (B, S, L)
    cached: CachedRows | None
    live: LiveRows | None


def prompt_of(scene: EncodedScene | PreparedScene, tokenizer: CLIPTokenizer) -> SubjectPrompt:
    """The scene's prompt; a caption that is too long is shortened.

    Raises:
        PromptError: a reserved token in the caption or a noun, or nouns that alone are too long.
    """
    return build_prompt(tokenizer, scene.caption, scene.nouns, spans=scene.spans, shorten=True)


def collate_scenes(
    scenes: Sequence[EncodedScene | PreparedScene],
    prompts: Sequence[SubjectPrompt],
    empty_ids: Tensor,
    supervise: Sequence[str],
) -> CollatedScenes:
    """Pad B scenes to a common number of subjects and references.

    Args:
        empty_ids: (L,) int64, the empty prompt.
    """
    rows, subjects = len(scenes), max(1, *(len(s.nouns) for s in scenes))
    references = max(1, *(max(s.reference_counts, default=0) for s in scenes))
    reference_keep = torch.zeros(rows, subjects, references, dtype=torch.bool)
    boxes, side = torch.zeros(rows, subjects, 4), scenes[0].masks.shape[-1]
    masks = torch.zeros(rows, subjects, side, side, dtype=torch.half)
    counts: Counter[str] = Counter()
    for row, scene in enumerate(scenes):
        for slot, count in enumerate(scene.reference_counts):
            reference_keep[row, slot, :count] = True
        boxes[row, : len(scene.nouns)] = scene.boxes
        masks[row, : len(scene.nouns)] = scene.masks
        counts["kept"] += len(scene.nouns)
        counts.update(scene.drops if isinstance(scene, PreparedScene) else {})
    conditions = {
        "input_ids": torch.stack([prompt.input_ids for prompt in prompts]),
        "plain_input_ids": torch.stack([prompt.plain_input_ids for prompt in prompts]),
        "empty_input_ids": empty_ids.expand(rows, -1).clone(),
        "placeholder_positions": _padded([p.placeholder_positions for p in prompts], subjects),
        "noun_ids": _padded_ids(prompts, subjects),
        "reference_keep": reference_keep,
        "subject_keep": reference_keep.any(dim=2),
        "boxes": boxes,
        "location_keep": torch.ones(rows, dtype=torch.bool),
        "strength": torch.ones(rows, subjects),
    }
    return CollatedScenes(
        keys=tuple(scene.key for scene in scenes),
        counts=dict(counts),
        conditions=conditions,
        masks=masks,
        supervised=supervised_weights(prompts, subjects, supervise),
        cached=_cached_rows([(row, s) for row, s in enumerate(scenes) if isinstance(s, EncodedScene)]),
        live=_live_rows([(row, s) for row, s in enumerate(scenes) if isinstance(s, PreparedScene)]),
    )


def assemble_batch(
    collated: CollatedScenes, device: torch.device, encoders: FrozenEncoders | None = None
) -> DiffusionBatch:
    """The batch on its device.

    Args:
        encoders: see what is live; None where nothing is.
    """
    on_device: CollatedScenes = send_to_device(collated, device, non_blocking=True)
    rows, subjects, references = on_device.conditions["reference_keep"].shape
    found: list[tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]] = []
    if on_device.cached is not None:
        found.append(on_device.cached)
    if on_device.live is not None:
        assert encoders is not None, "a live scene needs the frozen models"
        live = on_device.live
        found.append((live.rows, *encoders.latents(live.pictures), live.places, *encoders.features(live.frames)))
    _, latents, _, _, pooled, patches = found[0]
    batch_latents = torch.zeros(rows, *latents.shape[1:], device=device)
    batch_std = torch.zeros_like(batch_latents)
    batch_pooled = torch.zeros(rows, subjects, references, pooled.shape[1], device=device)
    batch_patches = torch.zeros(rows, subjects, references, *patches.shape[1:], device=device)
    for numbers, means, spreads, places, vectors, tokens in found:
        batch_latents[numbers] = means.float()
        if spreads is not None:
            batch_std[numbers] = spreads.float()
        batch_pooled[places.unbind(dim=1)] = vectors.float()
        batch_patches[places.unbind(dim=1)] = tokens.float()
    keep = on_device.conditions["reference_keep"]
    inputs = SubjectInputs(
        **on_device.conditions, pooled=_mean_of_kept(batch_pooled, keep), patches=batch_patches
    )  # fmt: skip
    return DiffusionBatch(
        latents=batch_latents,
        inputs=inputs,
        pooled_each=batch_pooled,
        masks=on_device.masks.float(),
        supervised=on_device.supervised,
        latent_std=None if all(spreads is None for _, _, spreads, *_ in found) else batch_std,
        keys=collated.keys,
    )


def diffusion_batch(
    scenes: Sequence[EncodedScene], tokenizer: CLIPTokenizer, supervise: Sequence[str], device: torch.device
) -> DiffusionBatch:
    """A batch of encoded scenes; captions of too long prompts are shortened."""
    prompts = [prompt_of(scene, tokenizer) for scene in scenes]
    return assemble_batch(collate_scenes(scenes, prompts, encode_ids(tokenizer, ""), supervise), device)


def draw_references(batch: DiffusionBatch, shared: torch.Generator) -> SubjectInputs:
    """The conditions with at most 1, 2 or 3 references a subject, one draw a batch in `REFERENCE_SHARES`.

    Padding costs as much as references do, so a batch with few of them is a quick one.

    Args:
        shared: the step's, `SampleDraws.shared`, so that all processes draw alike and none waits for another.
    """
    count = 1 + int(torch.multinomial(torch.tensor(REFERENCE_SHARES), 1, generator=shared))
    keep = batch.inputs.reference_keep[:, :, :count]
    return replace(
        batch.inputs,
        pooled=_mean_of_kept(batch.pooled_each[:, :, :count], keep),
        patches=batch.inputs.patches[:, :, :count],
        reference_keep=keep,
    )


def draw_latents(batch: DiffusionBatch, draws: SampleDraws) -> Tensor:
    """(B, C, h, w): latents drawn from the autoencoder's posterior, or its mean where the spread was not kept."""
    if batch.latent_std is None:
        return batch.latents
    return batch.latents + batch.latent_std * draws.normal(*batch.latents.shape[1:]).to(batch.latents)


def _cached_rows(scenes: list[tuple[int, EncodedScene]]) -> CachedRows | None:
    if not scenes:
        return None
    spreads = [scene.latent_std for _, scene in scenes if scene.latent_std is not None]
    return CachedRows(
        rows=torch.tensor([row for row, _ in scenes]),
        latents=torch.stack([scene.latents for _, scene in scenes]),
        latent_std=torch.stack(spreads) if spreads else None,
        places=_places([(row, scene.reference_counts) for row, scene in scenes]),
        pooled=torch.cat([scene.pooled for _, scene in scenes]),
        patches=torch.cat([scene.patches for _, scene in scenes]),
    )


def _live_rows(scenes: list[tuple[int, PreparedScene]]) -> LiveRows | None:
    if not scenes:
        return None
    return LiveRows(
        rows=torch.tensor([row for row, _ in scenes]),
        pictures=torch.stack([scene.picture for _, scene in scenes]),
        places=_places([(row, scene.reference_counts) for row, scene in scenes]),
        frames=torch.cat([scene.references for _, scene in scenes]),
    )


def _places(counts: list[tuple[int, tuple[int, ...]]]) -> Tensor:
    """Row, subject and number of each reference, in order: (M, 3)."""
    places = [(row, slot, k) for row, slots in counts for slot, count in enumerate(slots) for k in range(count)]
    return torch.tensor(places, dtype=torch.int64).reshape(-1, 3)


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
