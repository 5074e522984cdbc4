"""Pictures of the class beside those of the subject, so that learning "z dog" leaves "dog" as it was.

`regularisation` of the settings: `kind: none | generated | pipeline | shards`, each with its own keys and an `open`.
Prior preservation: DreamBooth, arXiv 2208.12242; real pictures: Custom Diffusion, arXiv 2212.04488.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.settings import Settings, settings_of
from infer.refine.method import Concept, RefineBase
from infer.refine.regularisation.generated import GeneratedRegularisation, PipelineRegularisation
from infer.refine.regularisation.shards import ShardsRegularisation
from infer.refine.samples import RegularisationSet

if TYPE_CHECKING:
    from infer.refine.settings import RefineSettings

WITH_PRIOR = ("custom-diffusion", "cross-init-custom-diffusion", "dreambooth", "adapter", "lora")


class NoRegularisation(Settings):
    """The subject's pictures only."""

    kind: Literal["none"] = "none"


class _Told(Settings):
    regularisation: Annotated[
        NoRegularisation | GeneratedRegularisation | PipelineRegularisation | ShardsRegularisation,
        Field(discriminator="kind"),
    ]


def open_regularisation(
    settings: RefineSettings, base: RefineBase, concepts: Sequence[Concept], size: int
) -> Sequence[RegularisationSet]:
    """One set a concept, or none.

    Args:
        base: before it is refined: some sets are drawn with it.
        size: side of the pictures in pixels.
    Raises:
        UserError: a key that is unknown, a method without use for it, pictures that cannot be had.
    """
    told = settings_of(_Told, {"regularisation": settings.regularisation}, "the settings").regularisation
    if isinstance(told, NoRegularisation):
        return ()
    if settings.method not in WITH_PRIOR:
        raise UserError(
            f"regularisation.kind={told.kind}: {settings.method} leaves the base as it is and needs none; expected "
            f"with {', '.join(WITH_PRIOR)}"
        )
    return [told.open(base, concept, size) for concept in concepts]
