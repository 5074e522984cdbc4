"""The subject archive: families share a split, the file is small, and building it twice gives the same bytes."""

from __future__ import annotations

import re
import zipfile
from dataclasses import asdict
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_pipeline.errors import UserError
from data_pipeline.toybox.archive import CUTOUT_SIZE, DEFAULT_ARCHIVE, SubjectArchive
from data_pipeline.toybox.families import SCENERY, families, group_word_of, noun_of, split_of
from scripts.build_toybox_archive import collect, held_out_too_late, write_archive


def test_a_family_stands_in_one_split() -> None:
    splits: dict[str, set[str]] = {}
    for subject in SubjectArchive().subjects:
        splits.setdefault(subject.family, set()).add(subject.split)
    assert all(len(found) == 1 for found in splits.values())


@pytest.mark.parametrize(
    "names",
    [
        ("twelve o’clock", "one-thirty", "alarm clock", "mantelpiece clock"),
        ("new moon", "full moon face", "crescent moon"),
        ("dog", "dog face", "guide dog", "poodle"),
        ("open mailbox with raised flag", "closed mailbox with lowered flag", "postbox"),
        ("open book", "green book", "books", "notebook"),
        ("page with curl", "page facing up"),
        ("bank", "classical building"),
        ("airplane", "airplane arrival", "airplane departure"),
        ("musical note", "musical notes"),
    ],
)
def test_things_that_look_alike_by_name_are_one_family(names: tuple[str, ...]) -> None:
    by_name = {subject.name: subject.family for subject in SubjectArchive().subjects}
    assert len({by_name[name] for name in names}) == 1


def test_all_clock_faces_are_one_family_and_all_moons_another() -> None:
    subjects = SubjectArchive().subjects
    faces = [subject.family for subject in subjects if re.search("o’clock|-thirty", subject.name)]
    moons = [subject.family for subject in subjects if re.search(r"\bmoon( face)?$", subject.name)]
    assert len(faces) == 24 and len(set(faces)) == 1
    assert len(moons) >= 12 and len(set(moons)) == 1


def test_the_packaged_archive_follows_the_rules_of_this_version() -> None:
    for subject in SubjectArchive().subjects:
        assert subject.noun == noun_of(subject.name)
        assert subject.group_word == group_word_of(subject.name, subject.group)
        assert subject.split == split_of(subject.family)


def test_the_splits_have_their_sizes() -> None:
    archive = SubjectArchive()
    total = len(archive.subjects)
    assert 0.05 < len(archive.of_split("heldout")) / total < 0.15
    assert 0.03 < len(archive.of_split("val")) / total < 0.1
    assert {subject.group for subject in archive.subjects} == {"Animals", "Food", "Travel", "Activities", "Objects"}


def test_the_archive_is_small_and_its_cutouts_have_an_outline() -> None:
    assert DEFAULT_ARCHIVE.stat().st_size < 5 * 2**20
    archive = SubjectArchive()
    for subject in archive.subjects[::20]:
        cutout = archive.cutout(subject.id)
        assert cutout.shape == (CUTOUT_SIZE, CUTOUT_SIZE, 4) and cutout.dtype == np.uint8
        assert 0.02 < (cutout[..., 3] > 127).mean() < 0.9


def test_equal_pictures_with_other_names_are_one_family() -> None:
    same, other = np.zeros(320), np.ones(320)
    assert families(["ox", "buffalo", "kite"], [same, same + 0.01, other]) == ["ox", "ox", "kite"]


def test_nouns_and_group_words() -> None:
    assert noun_of("guide dog") == "dog" and noun_of("cloud with rain") == "cloud"
    assert noun_of("police car") == "car" and noun_of("woman’s boot") == "shoe"
    assert group_word_of("guide dog", "Animals") == "animal" and group_word_of("red apple", "Food") == "fruit"
    assert noun_of("ear of corn") == "corn" and noun_of("page facing up") == "page"
    assert group_word_of("eggplant", "Food") == "vegetable" and group_word_of("parachute", "Travel") == "thing"
    assert group_word_of("guitar", "Objects") == "instrument" and group_word_of("key", "Objects") == "thing"


def test_a_subject_is_a_thing_and_no_scenery() -> None:
    names = {subject.name for subject in SubjectArchive().subjects}
    assert not names & SCENERY and {"sun", "snow-capped mountain", "volcano"} <= names


def test_a_family_that_joins_a_training_one_trains() -> None:
    by_name = {subject.name: subject.split for subject in SubjectArchive().subjects}
    assert by_name["bank"] == by_name["page with curl"] == by_name["airplane arrival"] == "train"


def test_what_models_have_seen_is_not_held_out_later() -> None:
    archive = SubjectArchive()
    unchanged = [asdict(subject) for subject in archive.subjects]
    assert held_out_too_late(unchanged, archive) == []
    moved = [{**entry, "split": "heldout"} if entry["name"] == "dog" else entry for entry in unchanged]
    assert held_out_too_late(moved, archive) == ["dog"]


def test_the_split_is_a_function_of_the_family() -> None:
    shares = [split_of(f"family {i}") for i in range(2000)]
    assert 0.07 < shares.count("heldout") / 2000 < 0.13 and 0.03 < shares.count("val") / 2000 < 0.07
    assert split_of("dog") == split_of("dog")


def test_building_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    assets = tmp_path / "assets"
    assets.mkdir()
    names = {}
    for i, (emoji, name) in enumerate({"🐕": "dog", "🍎": "red apple", "🎸": "guitar", "😀": "grinning face"}.items()):
        picture = np.zeros((160, 160, 4), np.uint8)
        cv2.circle(picture, (80, 80), 40 + 10 * i, (30 * i, 200, 90, 255), -1)
        cv2.imwrite(str(assets / f"{ord(emoji):04x}.webp"), picture)
        groups = ["Animals & Nature", "Food & Drink", "Objects", "Smileys & Emotion"]
        names[emoji] = {"name": name, "group": groups[i]}
    for target in ("first.zip", "second.zip"):
        write_archive(collect(assets, names), tmp_path / target)
    assert (tmp_path / "first.zip").read_bytes() == (tmp_path / "second.zip").read_bytes()
    assert [s.name for s in SubjectArchive(tmp_path / "first.zip").subjects] == ["dog", "red apple", "guitar"]


@pytest.mark.parametrize("content", [None, b"no zip", "empty"])
def test_a_missing_or_broken_archive_is_one_clear_line(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "subjects.zip"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "empty":
        zipfile.ZipFile(path, "w").close()
    with pytest.raises(UserError, match="subjects.zip: not a subject archive.*build it with") as error:
        SubjectArchive(path)
    assert "\n" not in str(error.value)
