"""The files of a run. A picture carries what made it; scores lie beside, one file a method and group; nothing is half.

    OUTPUT/settings.yaml
    OUTPUT/references/GROUP/0.png …          what the methods were given
    OUTPUT/pictures/METHOD/GROUP/CASE.png    with prompt, seed, model, settings, places, seconds and memory inside
    OUTPUT/scores/METHOD/GROUP.json          {metric: {case: {column: number}}}
    OUTPUT/scores/METHOD/GROUP.lock          held (flock) by the process that works on the group

A process that is killed loses its locks, and a picture or score file appears whole or not at all.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from data_pipeline.errors import UserError
from infer.evaluate.cases import Case, as_file_name
from infer.evaluate.methods import Answer, MethodPlan, Prepared
from infer.picture_file import PictureRecord, encode_picture, read_record
from infer.subjects import Box

_NUMBERS = ("seconds", "memory_bytes")
Scores = dict[str, dict[str, dict[str, float]]]  # metric: case: column: number


@dataclass(frozen=True)
class Made:
    """What is known of the making of a picture."""

    seconds: float  # of its batch, divided by the pictures in it
    memory_bytes: int  # peak, of the accelerator or else of the process
    prepared: Prepared  # what the method needed for its subjects before that
    model: str  # fingerprint of the weights
    boxes: tuple[Box, ...] | None = None  # where its subjects stand, as far as the method knows


class Store:
    """Reads and writes the folder of one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def picture_path(self, plan: MethodPlan, case: Case) -> Path:
        return self.picture_folder(plan) / case.group / f"{case.id}.png"

    def picture_folder(self, plan: MethodPlan) -> Path:
        return self.folder / "pictures" / as_file_name(plan.name)

    def write_picture(self, plan: MethodPlan, case: Case, answer: Answer, made: Made) -> None:
        """Store a picture with its record; replaces one that cannot be read."""
        places: Sequence[Box | None] = answer.boxes or (None,) * len(case.subjects)
        described = [{"noun": word, "box": box} for word, box in zip(case.words, places, strict=False)]
        numbers = {name: getattr(made, name) for name in _NUMBERS}
        settings = {"method": plan.resolved(), "made": numbers | {"prepared": asdict(made.prepared)}}
        record = PictureRecord(case.prompt, case.seed, made.model, settings, described)
        _write(self.picture_path(plan, case), encode_picture(answer.picture, record))

    def picture(self, plan: MethodPlan, case: Case) -> Made | None:
        """What is stored for a case; None if nothing is, or nothing that can be read.

        Raises:
            UserError: the picture there answers another question, or was drawn with other settings.
        """
        path = self.picture_path(plan, case)
        if not path.exists():
            return None
        try:
            record = read_record(path)
            made = {name: record.settings["made"][name] for name in _NUMBERS}
            prepared = Prepared(**record.settings["made"]["prepared"])
            settings = record.settings["method"]
            places = [entry["box"] for entry in record.subjects]
        except (UserError, KeyError, TypeError):
            return None
        now = plan.resolved()
        changed = [key for key in {**settings, **now} if settings.get(key) != now.get(key)]
        if (record.prompt, record.seed) != (case.prompt, case.seed):
            changed = ["prompt or seed"]
        if changed:
            raise UserError(
                f"{path}: was drawn with another {', '.join(sorted(changed))} than {plan.name!r} has now; give another "
                "output= or remove that method's folder"
            )
        boxes = None if None in places or not places else tuple(tuple(box) for box in places)
        return Made(**made, prepared=prepared, model=record.model, boxes=boxes)

    def scores_path(self, plan: MethodPlan, group: str) -> Path:
        return self.folder / "scores" / as_file_name(plan.name) / f"{group}.json"

    def scores(self, plan: MethodPlan, group: str) -> Scores:
        """Stored scores of a group, {} if there are none.

        Raises:
            UserError: the file is not whole.
        """
        path = self.scores_path(plan, group)
        if not path.exists():
            return {}
        try:
            found: Scores = json.loads(path.read_text(encoding="utf-8"))
            assert all(isinstance(row, dict) for metric in found.values() for row in metric.values())
            return found
        except (ValueError, AttributeError, AssertionError):
            raise UserError(
                f"{path}: a half-written score file; run evaluate again without --report, it scores those pictures anew"
            ) from None

    def write_scores(self, plan: MethodPlan, group: str, scores: Scores) -> None:
        _write(self.scores_path(plan, group), json.dumps(scores, indent=1).encode())

    def write_reference(self, group: str, number: int, cutout: Image.Image) -> str:
        """Store what a method was given; returns the path relative to the folder."""
        path = self.folder / "references" / group / f"{number}.png"
        if not path.exists():
            _write(path, encode_picture(cutout, None))
        return str(path.relative_to(self.folder))

    @contextmanager
    def claim(self, plan: MethodPlan, group: str) -> Iterator[bool]:
        """Yield True to the one process that may work on a method's group; others get False at once."""
        path = self.scores_path(plan, group).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True


def open_picture(path: Path) -> Image.Image:
    """A stored picture, RGB.

    Raises:
        UserError: it is damaged.
    """
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise UserError(f"{path}: damaged ({error}); remove it and run the same command again") from error


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); free the disk, then run the same command again"
        ) from error
