"""From prompts and subjects to `SubjectInputs`, the tensors that the model is conditioned on.

Second stage of generation: `ReferenceFeatures` looks at the cut-outs (once each, by content), `build_inputs` writes the
prompts and lines everything up. One row is one picture to be drawn; rows may differ in subjects and boxes.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer

from data_pipeline.errors import UserError
from infer.subjects import Box, Subject, match_nouns
from model.image_encoder import SubjectImageEncoder
from model.inputs import SubjectInputs
from model.learned_words import LearnedWords
from model.prompt import PromptError, SubjectPrompt, build_prompt, encode_ids
from model.reference import prepare_reference

Features = tuple[Tensor, Tensor]  # pooled (P,), patches (T, W)


@dataclass(frozen=True)
class PictureRequest:
    """What one picture is to show."""

    prompt: str
    negative_prompt: str = ""
    subjects: tuple[Subject, ...] = ()
    boxes: tuple[Box, ...] | None = None  # one a subject; None: the model chooses the places


class ReferenceFeatures:
    """Image features of cut-outs, computed once for equal content; the last `capacity` are kept."""

    def __init__(self, capacity: int = 256) -> None:
        self.capacity = capacity
        self._known: OrderedDict[str, Features] = OrderedDict()

    def __call__(self, encoder: SubjectImageEncoder, cutouts: Sequence[Image.Image]) -> list[Features]:
        """Features of each cut-out (RGBA), on the encoder's device and in its dtype."""
        keys = [self._key(encoder, cutout) for cutout in cutouts]
        for key, cutout in zip(keys, cutouts, strict=True):
            if key not in self._known:
                pixels = prepare_reference(np.array(cutout.convert("RGBA")), encoder.image_size)  # (3, H, W)
                # One at a time: in a batch the last bits of a picture would depend on its neighbours.
                pooled, patches = encoder(pixels[None].to(encoder.device, encoder.dtype))  # (1, P), (1, T, W)
                self._known[key] = (pooled[0], patches[0])
            self._known.move_to_end(key)
        found = [self._known[key] for key in keys]
        while len(self._known) > self.capacity:
            self._known.popitem(last=False)
        return found

    @staticmethod
    def _key(encoder: SubjectImageEncoder, cutout: Image.Image) -> str:
        content = hashlib.sha256(cutout.convert("RGBA").tobytes()).hexdigest()
        return f"{id(encoder)} {encoder.device} {encoder.dtype} {cutout.size} {content}"


def build_inputs(
    requests: Sequence[PictureRequest],
    tokenizer: CLIPTokenizer,
    encoder: SubjectImageEncoder | None,
    features: ReferenceFeatures,
    words: LearnedWords | None = None,
) -> SubjectInputs:
    """Line up the conditions of B pictures.

    Subjects enter the prompt in the order of their mentions, as in training. A picture whose strengths are all 0 is a
    picture without subjects: its prompt has no suffix. Placeholders of `words` become their tokens in prompts and
    negative prompts alike. `encoder` None: a plain base, which takes no subjects.

    Returns:
        `SubjectInputs` on the CPU for token ids and on the encoder's device for features; move it before use. With no
        subject in any row S is 0.
    Raises:
        UserError: a prompt is too long, contains the placeholder, or lacks a subject's noun; a subject is named by a
            learned word; there are subjects, but no encoder.
    """
    rows = [_in_order(request) for request in requests]
    prompts = [_prompt(tokenizer, request, words) for request in rows]
    count = max(len(prompt.placeholder_positions) for prompt in prompts)  # S
    references = max((len(s.references) for row in rows for s in row.subjects), default=0)  # R
    longest = max((len(ids) for prompt in prompts for ids in prompt.noun_ids), default=0)  # K
    inputs = _empty(prompts, [_negative(tokenizer, row, words) for row in rows], (count, references, longest), encoder)
    for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        inputs.location_keep[index] = row.boxes is not None and bool(row.subjects)
        for slot, subject in enumerate(row.subjects):
            if encoder is None:
                raise UserError(f"subject {subject.label}: a plain base draws none from photos; use a subject model")
            found = features(encoder, subject.references)
            inputs.pooled[index, slot] = torch.stack([pooled for pooled, _ in found]).mean(dim=0)  # (P,)
            for k, (_, patches) in enumerate(found):
                inputs.patches[index, slot, k] = patches  # (T, W)
            inputs.reference_keep[index, slot, : len(found)] = True
            inputs.subject_keep[index, slot] = True
            inputs.strength[index, slot] = subject.strength
            inputs.placeholder_positions[index, slot] = prompt.placeholder_positions[slot]
            ids = prompt.noun_ids[slot]
            inputs.noun_ids[index, slot, : len(ids)] = torch.tensor(ids)
            if row.boxes is not None:
                inputs.boxes[index, slot] = torch.tensor(row.boxes[slot])
    return inputs


def _in_order(request: PictureRequest) -> PictureRequest:
    """Subjects sorted by their mention in the prompt; none of them when all are switched off."""
    spans = match_nouns(request.prompt, request.subjects)
    if not any(subject.strength > 0 for subject in request.subjects):
        return PictureRequest(request.prompt, request.negative_prompt)
    order = sorted(range(len(spans)), key=lambda index: (spans[index], index))
    return PictureRequest(
        request.prompt,
        request.negative_prompt,
        tuple(request.subjects[index] for index in order),
        None if request.boxes is None else tuple(request.boxes[index] for index in order),
    )


def _prompt(tokenizer: CLIPTokenizer, request: PictureRequest, words: LearnedWords | None) -> SubjectPrompt:
    spans = match_nouns(request.prompt, request.subjects)
    text = request.prompt
    if words is not None:
        for subject in request.subjects:
            if subject.word is None and words.expand(subject.noun) != subject.noun:
                raise UserError(
                    f"subject {subject.label}: {subject.noun!r} is a refined word, which needs no reference; "
                    "name the reference by another word"
                )
        # Mentions are whole words, so what stands before an end of one is expanded as it is in the whole.
        spans = [(len(words.expand(text[:start])), len(words.expand(text[:end]))) for start, end in spans]
        text = words.expand(text)
    try:
        return build_prompt(tokenizer, text, [subject.noun for subject in request.subjects], spans=spans)
    except PromptError as error:
        raise UserError(f"prompt {request.prompt!r}: {error}") from error


def _negative(tokenizer: CLIPTokenizer, request: PictureRequest, words: LearnedWords | None) -> Tensor:
    text = request.negative_prompt if words is None else words.expand(request.negative_prompt)
    try:
        return encode_ids(tokenizer, text)  # (L,)
    except PromptError as error:
        raise UserError(f"negative prompt {request.negative_prompt!r}: {error}") from error


def _empty(
    prompts: Sequence[SubjectPrompt],
    negatives: Sequence[Tensor],
    counts: tuple[int, int, int],  # S, R, K
    encoder: SubjectImageEncoder | None,
) -> SubjectInputs:
    rows, (subjects, references, longest) = len(prompts), counts
    kind: dict[str, Any] = {} if encoder is None else {"device": encoder.device, "dtype": encoder.dtype}
    pooled, patches, width = (
        (0, 0, 0) if encoder is None else (encoder.pooled_dim, encoder.num_patches, encoder.patch_dim)
    )
    return SubjectInputs(
        input_ids=torch.stack([prompt.input_ids for prompt in prompts]),  # (B, L)
        plain_input_ids=torch.stack([prompt.plain_input_ids for prompt in prompts]),  # (B, L)
        empty_input_ids=torch.stack(list(negatives)),  # (B, L)
        placeholder_positions=torch.full((rows, subjects), -1),
        noun_ids=torch.full((rows, subjects, longest), -1),
        pooled=torch.zeros(rows, subjects, pooled, **kind),
        patches=torch.zeros(rows, subjects, references, patches, width, **kind),
        reference_keep=torch.zeros(rows, subjects, references, dtype=torch.bool),
        subject_keep=torch.zeros(rows, subjects, dtype=torch.bool),
        boxes=torch.zeros(rows, subjects, 4),
        location_keep=torch.zeros(rows, dtype=torch.bool),
        strength=torch.zeros(rows, subjects),
    )
