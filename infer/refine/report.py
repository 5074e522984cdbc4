"""The evaluator's report of a refinement, beside its file: a dozen prompts with what was learnt, and without it.

Asked for by `report.evaluate` when `refine` has written its file. Rows: the file; the subject model from the same
pictures without tuning, where there is one; the plain base. All pictures are given to all, so nothing here tells how
much of a score is a copy: `subject-diffusion evaluate`, which holds pictures back, does.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from data_pipeline.errors import UserError
from infer.evaluate.gather import gather
from infer.evaluate.report import write_report as write_pages
from infer.evaluate.runner import Plan, Scope, execute, missing_pictures
from infer.evaluate.settings import EvaluateSettings
from infer.loading import locate_model
from infer.picture_file import open_output_folder
from infer.refine.settings import RefineSettings
from infer.refine.subject_images import find_pictures
from model.saving import MANIFEST

SUBJECT_PROMPTS = {
    "new scene": [
        "a {} on the beach", "a {} in the snow", "a {} on the grass", "a {} in the desert", "a {} in a city street",
        "a {} at night",
    ],
    "relation": ["a {} next to a tree", "a {} beside a dog", "a {} on a wooden table"],
    "property change": ["a red {}"],
    "art rendition": ["an oil painting of a {}", "a pencil drawing of a {}"],
}  # fmt: skip
STYLE_PROMPTS = {
    "style": [
        f"{thing} in the style of {{}}"
        for thing in (
            "a dog", "a cat", "a bird", "a house", "a car", "a tree", "a boat", "a flower", "a cup", "a chair",
            "a mountain by the sea", "a city street",
        )
    ]
}  # fmt: skip
OURS = ("pictures", "scores", "references", "photos")  # folders of an older report, which the new one replaces


def write_report(settings: RefineSettings, file: Path) -> Path:
    """Draw, score and write `NAME-report/report.html` beside the file; one of an older file is replaced.

    Args:
        settings: of the run that made the file, with `report.evaluate`.
        file: what was learnt.
    Returns:
        The page. What could not be measured stands in it as a hole.
    Raises:
        UserError: a list of prompts that cannot be used, or a folder that cannot be written.
    """
    folder = open_output_folder(file.with_name(f"{file.stem}-report"))
    for name in OURS:
        shutil.rmtree(folder / name, ignore_errors=True)
    run = _comparison(settings, file, folder)
    plan = Plan.of(run, Scope())
    lines = _without_cutouts(plan) if "zero-shot" in run.methods else []
    if lines:
        plan = Plan.of(run.model_copy(update={"methods": _but(run.methods, "zero-shot")}), Scope())
    _, missing = missing_pictures(plan)
    page, *_ = write_pages(gather(plan, [*lines, *execute(plan, Scope(), 1, missing)]))
    return page


def _comparison(settings: RefineSettings, file: Path, folder: Path) -> EvaluateSettings:
    """What is compared: drawn as the previews are."""
    asked = settings.report.evaluate
    assert asked is not None, "report.evaluate asks for the report"
    styles = {concept.kind for concept in settings.concepts.values()} == {"style"}
    drawn = {
        "steps": settings.report.preview_steps,
        "guidance_scale": settings.report.preview_guidance,
    }
    model = {"model": settings.model, "guidance": "joint", **drawn}
    methods: dict[str, dict[str, Any]] = {
        settings.method: {"kind": "refined", "file": str(file), "plain": settings.plain, **model}
    }
    parts = _trained_parts(settings.model)
    if not styles and (parts or not settings.plain):
        methods["zero-shot"] = {"kind": "zero_shot", **model}
    if parts or settings.plain:  # a subject model that was saved whole does not bring its base
        methods["plain base"] = {"kind": "plain_base", "base": settings.model, **drawn}
    photos = _copy_photos(settings, folder / "photos")
    prompts = asked.prompts or _write_prompts(folder / "prompts.yaml", STYLE_PROMPTS if styles else SUBJECT_PROMPTS)
    return EvaluateSettings.model_validate(
        {
            "name": f"{settings.method} of {', '.join(concept.class_word for concept in settings.concepts.values())}",
            "output": folder,
            "protocol": {
                "kind": "folder",
                "folder": folder / "photos",
                "prompts": prompts,
                "seeds": asked.seeds,
                "inputs": photos,
                "cutout": "none" if styles else "auto",
            },
            "methods": methods,
            "metrics": asked.metrics,
            "crops": "none",
            "threads": torch.get_num_threads(),
            "device": settings.device,
        }
    )


def _trained_parts(model: str) -> Path | None:
    """The folder of a subject model that names its base; None: a plain base, or a model that was saved whole."""
    try:
        place = locate_model(model)
    except UserError:
        return None
    return place if isinstance(place, Path) and (place / MANIFEST).exists() else None


def _copy_photos(settings: RefineSettings, folder: Path) -> int:
    """Each concept's pictures under its placeholder, as the evaluator reads folders; the largest number of them."""
    words, most = {}, 0
    for placeholder, concept in settings.concepts.items():
        place = folder / placeholder
        place.mkdir(parents=True)
        files = find_pictures(concept.images)
        for number, file in enumerate(files):
            shutil.copyfile(file, place / f"{number:03d}{file.suffix.lower()}")
        words[placeholder], most = concept.class_word, max(most, len(files))
    (folder / "subjects.yaml").write_text(yaml.safe_dump(words, allow_unicode=True), encoding="utf-8")
    return most


def _write_prompts(file: Path, prompts: dict[str, list[str]]) -> Path:
    file.write_text(yaml.safe_dump({"object": prompts}, sort_keys=False), encoding="utf-8")
    return file


def _without_cutouts(plan: Plan) -> list[str]:
    """A line for each subject that does not stand out from its photos, so that nothing can be drawn from them."""
    lines = []
    for subject in dict.fromkeys(subject for case in plan.protocol.cases for subject in case.subjects):
        try:
            _ = subject.cutouts
        except UserError as error:
            lines.append(f"zero-shot is left out: {error}")
    return lines


def _but(methods: dict[str, dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    return {key: value for key, value in methods.items() if key != name}
