"""Refinements put to use in a pipeline: checked against its base, their words in one vocabulary, then their weights.

install_refinements(pipeline, [read_refinement(path) for path in paths], "toybox")
pipeline("a z hugging a y beside a dog", [Subject("dog", [cutout])])
"""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.errors import UserError
from infer.pipeline import SubjectDiffusionPipeline
from infer.refine.methods import METHODS, load_method
from infer.refine.refinement import Refinement
from infer.refine.words import install_words
from model.learned_words import Mode
from model.saving import base_fingerprint

SAME_WEIGHTS = {"cross-init-custom-diffusion": "custom-diffusion"}  # they differ in how a word starts, and merge alike
CHANGES_UNET = ("custom-diffusion", "dreambooth", "adapter", "lora")


def install_refinements(
    pipeline: SubjectDiffusionPipeline,
    refinements: Sequence[Refinement],
    model: str,
    *,
    mode: Mode | None = None,
    scale: float | None = None,
    adaptive_weight: float | None = None,
) -> None:
    """Put refinements to use, all at once; nothing is changed where one does not belong to this base.

    Args:
        refinements: any number, of one method or several.
        model: name of the pipeline's model, for messages.
        mode: of adaptive words; None: as their files say, `fast` only where all do.
        scale: factor on the vectors of their words; None: as their files say.
        adaptive_weight: w of adaptive words; None: as their files say.

    Raises:
        UserError: another base; files that cannot be used together; a placeholder that is taken.
    """
    fingerprint = base_fingerprint(pipeline.unet, pipeline.text_encoder)
    for refinement in refinements:
        if refinement.method not in METHODS:
            raise UserError(
                f"{refinement.label}: method {refinement.method!r} is unknown here; expected one of "
                f"{', '.join(METHODS)}"
            )
        refinement.check_base(model, fingerprint)
        weighed = bool(refinement.references) or load_method(refinement.method).has_strength
        if refinement.strength != 1 and not weighed:
            raise UserError(
                f"{refinement.label}: strength {refinement.strength:g}: {refinement.method} has none; only adapter and "
                "lora do, and what was refined with references"
            )
    _check_together(refinements)
    install_words(pipeline, refinements, mode=mode, scale=scale, adaptive_weight=adaptive_weight)
    groups: dict[str, list[Refinement]] = {}
    for refinement in refinements:
        groups.setdefault(SAME_WEIGHTS.get(refinement.method, refinement.method), []).append(refinement)
    # LoRA last: it renames the weights that the others put in their places.
    for name in sorted(groups, key=lambda name: name == "lora"):
        load_method(name).install(pipeline, groups[name])
    pipeline.references = (*pipeline.references, *(one for refinement in refinements for one in refinement.subjects()))
    pipeline.installed = (*pipeline.installed, *(refinement.digest() for refinement in refinements))


def _check_together(refinements: Sequence[Refinement]) -> None:
    """Refuse DreamBooth beside anything else that changes the UNet."""
    changing = [one for one in refinements if SAME_WEIGHTS.get(one.method, one.method) in CHANGES_UNET]
    whole = next((one for one in changing if one.method == "dreambooth"), None)
    if whole is not None and len(changing) > 1:
        other = next(one for one in changing if one is not whole)
        raise UserError(
            f"{whole.label} and {other.label}: DreamBooth moves every weight of the UNet, and what {other.method} has "
            "learnt stands on the weights as they were; draw with one of them"
        )
