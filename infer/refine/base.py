"""The model a refinement is made on: the trained subject model with its subjects null, or a plain base.

On the subject model refined and zero-shot subjects meet in one picture; the published methods start from a plain base.
"""

from __future__ import annotations

from infer.drawing import usable_device
from infer.loading import hush_libraries
from infer.pipeline import SubjectDiffusionPipeline
from infer.refine.method import RefineBase
from model.saving import base_fingerprint


def open_base(model: str, plain: bool, device: str, templates: tuple[str, ...]) -> RefineBase:
    """Load the pipeline and freeze it.

    Args:
        model: subject model, by shipped name, folder or hub id; or a plain base.
        plain: take the plain base, or that of the subject model.
        device: auto, cpu, cuda …
        templates: texts that the concept is trained with.
    Raises:
        UserError: nothing of that name.
    """
    hush_libraries()
    own = SubjectDiffusionPipeline
    pipeline = own.from_plain_base(model) if plain else own.from_pretrained(model)
    pipeline.to(usable_device(device))
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet, pipeline.adapter, pipeline.image_encoder):
        if part is not None:
            part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    name = f"{model} (plain)" if plain else model
    return RefineBase(pipeline, name, base_fingerprint(pipeline.unet, pipeline.text_encoder), templates)
