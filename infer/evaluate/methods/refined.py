"""Tuned to each subject by `refine`, from pictures with backgrounds; then drawn with its file in the place of its word.

A subject is tuned once, however many rows, prompts and processes ask for it; pairs are drawn with two of these files.

    OUTPUT/refined/METHOD-FINGERPRINT/SUBJECT.safetensors   what was learnt
    OUTPUT/refined/METHOD-FINGERPRINT/SUBJECT.json          what that took; written last
    OUTPUT/refined/METHOD-FINGERPRINT/SUBJECT.log           what `refine` said
    OUTPUT/refined/METHOD-FINGERPRINT/SUBJECT/0.png …       what it was learnt from; 0.mask.png and 0.txt where known
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import Field, model_validator

from data_pipeline.errors import UserError
from data_pipeline.settings import settings_of
from infer.drawing import DrawSettings, open_pipeline, usable_device
from infer.evaluate.cases import Case, EvaluatedSubject
from infer.evaluate.costs import Costs
from infer.evaluate.methods import Answer, Prepared
from infer.evaluate.settings import EvaluateSettings
from infer.pipeline import SubjectDiffusionPipeline
from infer.refine.command import refine
from infer.refine.install import install_refinements
from infer.refine.methods import load_method
from infer.refine.refinement import Refinement, read_refinement, rename_placeholders
from infer.refine.settings import RefineSettings
from infer.refine.subject_images import MASK
from infer.refine.task import method_settings
from infer.subjects import Subject, match_nouns, with_mentioned

BOUND = False
PLACEHOLDERS = ("z", "y")  # what the first and the second subject of a prompt are called
PREVIEW = {"preview_prompts": ["{}"], "preview_steps": 10}  # hardly any: the time of tuning is to be its own
NOT_DECIDING = {"concepts", "output", "runs_dir", "report", "workers", "device"}  # keys that change no picture


class MethodSettings(DrawSettings):
    """How `generate` draws, and how subjects are learnt. Model and base are those they are learnt on."""

    refine: dict[str, Any] = {}  # as a configuration of `refine` says it; `config` names files whose keys come first
    file: Path | None = None  # a file that is there already, in place of `refine`; subjects are called by its words
    images: int = Field(4, ge=1)  # pictures of a subject to learn from; the protocol gives `tuning_photos` at most

    @model_validator(mode="before")
    @classmethod
    def _with_files(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("refine", {}), dict):
            return values
        if ("refine" in values) == (values.get("file") is not None):
            raise UserError(
                "refined: expected `refine`, how subjects are learnt, or `file`, what was learnt; one of them"
            )
        if "refine" not in values:
            return values
        said = dict(values["refine"])
        files = said.pop("config", ())
        tuned = _tuning(said, [Path(file) for file in ([files] if isinstance(files, str) else files)])
        for key in ("model", "plain"):
            if key in values and values[key] != getattr(tuned, key):
                raise UserError(f"{key}={values[key]!r}: subjects are drawn as they are learnt; say refine.{key} only")
        told = tuned.model_dump(mode="json", exclude_unset=True, exclude=NOT_DECIDING)
        return {**values, "model": tuned.model, "plain": tuned.plain, "refine": told}


@dataclass(frozen=True)
class Tuned:
    """A subject's file and what it took."""

    file: Path
    seconds: float  # from its pictures to the file; of an interrupted tuning, since it went on
    memory_bytes: int  # at the peak
    pictures: int


class Refined:
    """Draws with the files of the subjects that it was prepared for; before that, as the base alone."""

    def __init__(self, settings: MethodSettings, run: EvaluateSettings) -> None:
        self.settings, self.run = settings, run
        told = json.dumps([settings.refine, settings.images], sort_keys=True)
        name = f"{settings.refine.get('method')}-{hashlib.sha256(told.encode()).hexdigest()[:10]}"
        self.folder = run.output / "refined" / name  # of what is tuned here
        self.pipeline: SubjectDiffusionPipeline | None = None
        self.model, self.things = "", dict[str, str]()  # subject: what it is called in prompts, "z" or "z dog"

    def prepare(self, subjects: Sequence[EvaluatedSubject]) -> Prepared:
        """Tune those that are not tuned yet, and put the files to use.

        Raises:
            UserError: nothing to learn from, or what `refine` cannot do.
        """
        self.pipeline = None  # tuning needs the memory
        if self.settings.file is not None:
            known = read_refinement(self.settings.file)
            self._use([known], {word: told["thing"] for word, told in known.words.items()})
            return Prepared(max(one.given for one in subjects), kept_bytes=self.settings.file.stat().st_size)
        tuned = [self._tuned(subject) for subject in subjects]
        called = [_called(read_refinement(one.file), word) for one, word in zip(tuned, PLACEHOLDERS, strict=False)]
        things = [told["thing"] for refinement in called for told in refinement.words.values()]
        self._use(called, {subject.id: thing for subject, thing in zip(subjects, things, strict=True)})
        return Prepared(
            pictures=max(one.pictures for one in tuned),
            kept_bytes=round(fmean(one.file.stat().st_size for one in tuned)),
            seconds=fmean(one.seconds for one in tuned),
            memory_bytes=max(one.memory_bytes for one in tuned),
        )

    def draw(self, cases: Sequence[Case]) -> list[Answer]:
        pipeline = self.pipeline or self._use((), {})
        shown = [self._subjects(case, pipeline.references) for case in cases]
        drawn = pipeline(
            [self._prompt(case) for case in cases],
            shown,
            **self.settings.call_arguments(),
            generator=[torch.Generator().manual_seed(case.seed) for case in cases],
        )
        return [
            Answer(picture, tuple(boxes) if boxes and len(boxes) == len(case.subjects) else None)
            for picture, boxes, case in zip(drawn.images, drawn.boxes, cases, strict=True)
        ]

    def _subjects(self, case: Case, references: Sequence[Subject]) -> list[Subject]:
        """What is shown beside the case's words where they were refined with references, in the places asked for."""
        if not self.things or not case.subjects:
            return []
        boxes = case.boxes if case.boxes and self.settings.layout != "none" else (None,) * len(case.subjects)
        return [
            replace(shown, box=box)
            for subject, box in zip(case.subjects, boxes, strict=True)
            for shown in with_mentioned(self.things[subject.id], (), references)
        ]

    def _prompt(self, case: Case) -> str:
        """The case's prompt with what each subject is called in the place of its word."""
        if not self.things or not case.subjects:
            return case.prompt
        spans = match_nouns(case.prompt, [Subject(word, []) for word in case.words])
        return with_things(case.prompt, spans, [self.things[subject.id] for subject in case.subjects])

    def _use(self, refinements: Sequence[Refinement], things: dict[str, str]) -> SubjectDiffusionPipeline:
        """A fresh pipeline with these and nothing of those before."""
        pipeline = open_pipeline(self.settings, self.run.device, self.run.precision)
        pipeline.set_progress_bar_config(disable=True)
        name = f"{self.settings.model} (plain)" if self.settings.plain else self.settings.model
        install_refinements(pipeline, refinements, name)
        self.pipeline, self.model, self.things = pipeline, pipeline.fingerprint(), things
        return pipeline

    def _tuned(self, subject: EvaluatedSubject) -> Tuned:
        """The subject's file; one process at a time makes it, others wait."""
        file = self.folder / f"{subject.id}.safetensors"
        known = file.with_suffix(".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not known.exists():
                made = self._tune(subject, file)
                part = known.with_suffix(".part")
                part.write_text(json.dumps({**asdict(made), "file": file.name}), encoding="utf-8")
                part.replace(known)
            return Tuned(**{**json.loads(known.read_text(encoding="utf-8")), "file": file})

    def _tune(self, subject: EvaluatedSubject, file: Path) -> Tuned:
        photos = subject.tuning[: self.settings.images]
        if not photos:
            raise UserError(f"subject {subject.id}: no pictures to tune to it; say protocol.tuning_photos=4")
        pictures = file.with_suffix("")
        pictures.mkdir(exist_ok=True)
        for i, photo in enumerate(photos):
            photo.open().save(pictures / f"{i}.png")
            if photo.mask:
                photo.mask().save(pictures / f"{i}{MASK}")
            if photo.caption:
                (pictures / f"{i}.txt").write_text(photo.caption, encoding="utf-8")
        concept = {"images": [str(pictures / f"{i}.png") for i in range(len(photos))], "class_word": subject.noun}
        settings = _tuning(
            {
                **self.settings.refine,
                "concepts": {PLACEHOLDERS[0]: concept},
                "output": str(file),
                "runs_dir": str(self.run.output / "refined" / "runs"),
                "device": self.run.device,
                "report": PREVIEW,
            }
        )
        precision = torch.get_float32_matmul_precision()
        with file.with_suffix(".log").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
            with Costs() as costs:
                refine(settings)
        torch.set_float32_matmul_precision(precision)  # the loop may have chosen another one
        return Tuned(file, costs.seconds, costs.memory_bytes, len(photos))


def with_things(prompt: str, spans: Sequence[tuple[int, int]], things: Sequence[str]) -> str:
    """A prompt with other words at some places, "an" before them turned to "a": placeholders are no vowels.

    Args:
        spans: (start, end) of the words that are replaced.
        things: what takes their places.
    """
    for (start, end), thing in sorted(zip(spans, things, strict=True), reverse=True):
        before = re.sub(r"\b([Aa])n (\s*)$", r"\1 \2", prompt[:start])
        prompt = before + thing + prompt[end:]
    return prompt


def _called(refinement: Refinement, word: str) -> Refinement:
    """The refinement with that placeholder, in what it is called in prompts too ("z dog")."""
    ((own, told),) = refinement.words.items()
    if own == word:
        return refinement
    renamed = rename_placeholders(refinement, [(own, word)])
    thing = re.sub(rf"(?<!\w){re.escape(own)}(?!\w)", word, told["thing"])
    renamed.words[word]["thing"] = thing
    return renamed


def _tuning(said: dict[str, Any], files: Sequence[Path] = ()) -> RefineSettings:
    """Settings of `refine`; where they name no concepts or output yet, with some in their places.

    Raises:
        UserError: a key or value that cannot be.
    """
    missing = {"concepts": {PLACEHOLDERS[0]: {"images": ["."], "class_word": "thing"}}, "output": "any.safetensors"}
    settings = settings_of(RefineSettings, {**missing, **said}, "refine", files)
    method_settings(settings)
    return settings


def answers(case: Case, settings: MethodSettings) -> bool:
    if case.part != "pair" or not settings.refine:
        return bool(case.prepared_for)
    tuned = _tuning(settings.refine)
    return load_method(tuned.method).joins(method_settings(tuned))


def create(settings: MethodSettings, run: EvaluateSettings) -> Refined:
    device = torch.device(usable_device(run.device))
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # `refine` learns on the one that is current
    return Refined(settings, run)
