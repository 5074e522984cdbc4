"""Where a learned word starts when it starts from the zero-shot prediction: the subject model's own concept vector.

The subject model turns the pictures' mean CLS into the vector that stands at `<subject>` in its prompts
(`SubjectAdapter.concepts`; Subject-Diffusion, arXiv 2307.11410). Here the same vector becomes the first value of a row.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from data_pipeline.errors import UserError
from infer.conditions import PictureRequest, build_inputs
from infer.refine.method import Concept, RefineBase
from infer.refine.references import cutouts_of
from infer.subjects import Subject

Start = Literal["words", "zero_shot"]


@torch.no_grad()
def zero_shot_vector(base: RefineBase, concept: Concept) -> Tensor:
    """What generation would put at `<subject>` for these pictures: (D,) float32 on the CPU.

    Raises:
        UserError: a base without such a prediction; a picture in which no subject stands out.
    """
    pipeline = base.pipeline
    adapter, encoder = pipeline.adapter, pipeline.image_encoder
    if adapter is None or encoder is None:
        raise UserError("start=zero_shot: a plain base cannot look at pictures; take a subject model, or start=words")
    if adapter.concept is None or adapter.config["fusion"] != "before":
        raise UserError(
            f"start=zero_shot: {base.name} puts no concept into the prompt that a word could stand for; take "
            "start=words"
        )
    request = PictureRequest(concept.class_word, subjects=(Subject(concept.class_word, cutouts_of(concept)),))
    inputs = build_inputs([request], pipeline.tokenizer, encoder, pipeline.reference_features)
    embedding = pipeline.text_encoder.embeddings.token_embedding
    concepts = adapter.concepts(inputs.to(embedding.weight.device), embedding)  # (1, 1, D)
    return (adapter.config["fusion_scale"] * concepts[0, 0]).float().cpu()
