"""How pictures are drawn, as settings, and the pipeline that they ask for: shared by `generate` and `evaluate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from data_pipeline.errors import UserError
from data_pipeline.settings import Settings

if TYPE_CHECKING:
    from infer.pipeline import SubjectDiffusionPipeline

Precision = Literal["fp32", "bf16", "fp16"]
SchedulerName = Literal["ddim", "ddpm", "dpmsolver++", "euler", "euler_ancestral", "heun", "lms", "pndm", "unipc"]
_CLASSES: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}


class DrawSettings(Settings):
    """Everything that decides a picture besides prompt, subjects and seed."""

    model: str = "toybox"  # shipped name, folder or hub id
    base: str | None = None  # another base for trained parts than the one they name
    plain: bool = False  # draw with the plain base of the model, for subjects that were refined on it
    scheduler: SchedulerName | None = None  # sampler; null: the model's own
    steps: int = Field(50, ge=1, le=1000)
    guidance: Literal["separate", "joint", "none"] = "separate"
    guidance_scale: float = Field(7.5, ge=0)  # s_t, how closely the text is followed
    subject_guidance_scale: float = Field(1.5, ge=0)  # s_i, how closely the references are followed (separate only)
    beta: float = Field(1.0, ge=0)  # scale of the adapter's residuals
    subject_start: float = Field(0.0, ge=0, le=1)  # share of the steps from which on subjects are drawn
    subject_end: float = Field(1.0, ge=0, le=1)  # share of the steps until which subjects are drawn
    subject_until: float = Field(1.0, ge=0, le=1)  # share of the steps after which the plain base takes over
    layout: Literal["seeded", "none"] = "seeded"  # places of subjects without a box; none: the model chooses
    negative_prompt: str = ""  # what to stay away from
    width: int | None = Field(None, gt=0)  # pixels; null: the size the model was trained at
    height: int | None = Field(None, gt=0)

    def call_arguments(self) -> dict[str, Any]:
        """Keyword arguments of `SubjectDiffusionPipeline.__call__`."""
        named = ("guidance", "guidance_scale", "subject_guidance_scale", "beta", "subject_start", "subject_end")
        also = ("subject_until", "layout", "negative_prompt", "width", "height")
        return {"num_inference_steps": self.steps, **{name: getattr(self, name) for name in (*named, *also)}}


def usable_device(name: str) -> str:
    """The device of that name, `auto` resolved to cuda or cpu.

    Raises:
        UserError: torch cannot use it.
    """
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {device}: cannot be used ({reason}); expected auto, cpu or cuda") from error
    return device


def torch_dtype(precision: Precision) -> Any:
    """The `torch.dtype` of a precision's name."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def open_pipeline(settings: DrawSettings, device: str, precision: Precision) -> SubjectDiffusionPipeline:
    """The pipeline of `settings.model` on a device, with the sampler asked for.

    Raises:
        UserError: no such model, device or sampler for this model.
    """
    from infer.loading import hush_libraries
    from infer.pipeline import SubjectDiffusionPipeline

    hush_libraries()
    device = usable_device(device)
    if settings.plain:
        pipeline = SubjectDiffusionPipeline.from_plain_base(settings.base or settings.model, torch_dtype(precision))
    else:
        pipeline = SubjectDiffusionPipeline.from_pretrained(settings.model, settings.base, dtype=torch_dtype(precision))
    pipeline.scheduler = sampler(pipeline.scheduler, settings.scheduler)
    return pipeline.to(device)


def sampler(own: Any, name: SchedulerName | None) -> Any:
    """The sampler of that name for the noise that the model's own scheduler describes; None: that one."""
    import diffusers

    return own if name is None else getattr(diffusers, _CLASSES[name]).from_config(own.config)
