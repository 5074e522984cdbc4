"""The archive of toybox subjects: one zip of RGBA cut-outs (webp) with an index, split by family.

The art is Microsoft's Fluent Emoji in 3D (MIT, see SUBJECTS-LICENSE); `scripts/build_toybox_archive.py` builds the zip.
All subjects of a family (24 clock faces, dog / dog face / guide dog) share a split, so that held-out means unseen.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data_pipeline.errors import UserError

DEFAULT_ARCHIVE = Path(__file__).with_name("subjects.zip")
CUTOUT_SIZE = 128  # pixels, side of every cut-out


@dataclass(frozen=True)
class ToyboxSubject:
    """A particular thing that can be drawn."""

    id: str
    name: str  # "guide dog"
    noun: str  # head noun used in captions: "dog"
    group: str  # Animals, Food, Travel, Activities or Objects
    group_word: str  # what stands for the noun when it shall not give the subject away: "animal"
    family: str
    split: str  # train, val or heldout


class SubjectArchive:
    """Subjects and their cut-outs; cut-outs are decoded once and kept."""

    def __init__(self, path: Path = DEFAULT_ARCHIVE) -> None:
        """Open an archive.

        Raises:
            UserError: the file is missing or no subject archive.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                index = json.loads(archive.read("subjects.json"))
                self._encoded = {entry["id"]: archive.read(f"{entry['id']}.webp") for entry in index}
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"{path}: not a subject archive ({error}); build it with scripts/build_toybox_archive.py"
            ) from error
        self.subjects: tuple[ToyboxSubject, ...] = tuple(ToyboxSubject(**entry) for entry in index)
        self._decoded: dict[str, np.ndarray] = {}

    def of_split(self, split: str) -> tuple[ToyboxSubject, ...]:
        """Subjects of "train", "val" or "heldout", in the order of the archive."""
        return tuple(subject for subject in self.subjects if subject.split == split)

    def cutout(self, subject_id: str) -> np.ndarray:
        """(128, 128, 4) uint8 RGBA; do not write into it."""
        if subject_id not in self._decoded:
            data = np.frombuffer(self._encoded[subject_id], np.uint8)
            bgra = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
            assert bgra is not None, subject_id
            self._decoded[subject_id] = np.ascontiguousarray(cv2.cvtColor(bgra, cv2.COLOR_BGRA2RGBA))
        return self._decoded[subject_id]
