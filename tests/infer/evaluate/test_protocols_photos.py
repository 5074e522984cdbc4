"""Protocols of photos: DreamBench as it is published, any folder, OpenImages' test split; what is missing is a hole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

from data_pipeline.errors import UserError
from infer.evaluate.cases import Protocol
from infer.evaluate.protocols import class_cases, load_protocol
from infer.evaluate.protocols.prompts import with_article
from infer.evaluate.settings import ProtocolSettings
from tests.infer.evaluate.photo_folders import CLASSES, write_dreambench, write_openimages, write_photo

PROMPTS = "object: {new scene: ['a {} on the beach', 'a red {}']}\npair: {relation: ['a {} on top of a {}']}\n"


@pytest.fixture
def dreambench(tmp_path: Path) -> Path:
    return write_dreambench(tmp_path / "dataset")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.yaml"
    file.write_text(PROMPTS)
    return file


def load(kind: str, folder: Path, **settings: Any) -> Protocol:
    return load_protocol(ProtocolSettings(kind=kind, folder=folder, **settings))


def seeds(protocol: Protocol) -> dict[str, int]:
    return {case.id: case.seed for case in protocol.cases}


def test_dreambench_is_every_subject_with_its_prompts_and_seeds(dreambench: Path) -> None:
    protocol = load("dreambench", dreambench, seeds=4)
    assert not protocol.holes
    assert len(protocol.cases) == len(CLASSES) * 3 * 4
    assert [group[0].group for group in protocol.groups()] == [*CLASSES]
    asked = {case.id: case for case in protocol.cases}
    assert asked["backpack--01--2"].prompt == "a backpack on top of green grass with sunflowers around it"
    assert asked["cat--01--0"].prompt == "a cat wearing a red hat"
    assert asked["pink_sunglasses--02--0"].prompt == "red glasses"
    assert asked["bear_plushie--00--0"].words == ("stuffed animal",)
    kinds = [asked[f"{name}--0{i}--0"].kind for name in ("backpack", "cat") for i in range(3)]
    assert kinds == ["new scene", "relation", "property change", "new scene", "accessory", "accessory"]


def test_no_two_cases_share_a_seed(dreambench: Path) -> None:
    protocol = load("dreambench", dreambench, seeds=4, pairs=3, pair_seeds=6)
    assert len(set(seeds(protocol).values())) == len(protocol.cases)


def test_a_subset_or_more_seeds_ask_for_the_same_pictures(dreambench: Path) -> None:
    every = seeds(load("dreambench", dreambench, seeds=4, pairs=[("cat", "backpack")]))
    for settings in ({"subjects": 1}, {"subjects": ("cat",)}, {"seeds": 0, "pairs": [("cat", "backpack")]}):
        some = seeds(load("dreambench", dreambench, **settings))
        assert some and some.items() <= every.items()
    assert every == seeds(load("dreambench", dreambench, seeds=4, pairs=[("cat", "backpack")]))
    assert every["backpack--00--0"] == 2_619_107_854  # CRC-32 of the id, by gzip


def test_pairs_get_the_object_prompts_for_two_and_their_own_seeds(dreambench: Path) -> None:
    protocol = load("dreambench", dreambench, seeds=0, pairs=[("cat", "backpack"), ("backpack", "cat")], pair_seeds=6)
    assert len(protocol.cases) == 2 * 3 * 6
    asked = {case.id: case for case in protocol.cases}
    assert (
        asked["cat+backpack--01--5"].prompt == "a cat and a backpack on top of green grass with sunflowers around them"
    )
    assert asked["backpack+cat--02--0"].prompt == "a red backpack and a red cat"
    assert asked["backpack+cat--02--0"].group == "backpack+cat" and asked["backpack+cat--02--0"].part == "pair"


def test_a_number_of_pairs_means_neighbours_with_different_words(dreambench: Path) -> None:
    names = [group[0].group for group in load("dreambench", dreambench, seeds=0, pairs=9).groups()]
    assert names == ["backpack+cat", "cat+pink_sunglasses", "pink_sunglasses+bear_plushie", "bear_plushie+backpack"]


def test_neighbours_of_the_same_word_are_passed_over(tmp_path: Path, prompts: Path) -> None:
    for name in ("cat1", "cat2", "dog"):
        write_photo(tmp_path / "photos" / f"{name}.png")
    names = [
        group[0].group for group in load("folder", tmp_path / "photos", prompts=prompts, seeds=0, pairs=9).groups()
    ]
    assert names == ["cat1+dog", "cat2+dog", "dog+cat1"]
    (tmp_path / "photos" / "dog.png").unlink()
    alone = load("folder", tmp_path / "photos", prompts=prompts, pairs=2)
    assert alone.holes == ("pairs=2: no two subjects with different words",)
    assert {case.part for case in alone.cases} == {"single"}


def test_the_first_photos_by_name_are_given_or_the_one_that_is_named(dreambench: Path) -> None:
    def given(**settings: Any) -> list[str]:
        subject = load("dreambench", dreambench, subjects=("cat",), **settings).cases[0].subjects[0]
        return [Path(photo.name).name for photo in subject.photos[: subject.given]]

    assert given() == ["00.jpg"]
    assert given(inputs=2) == ["00.jpg", "01.jpg"]
    assert given(input_photos={"cat": "01.jpg"}) == ["01.jpg"]


def test_a_subject_without_photos_is_a_hole_and_the_rest_goes_on(dreambench: Path) -> None:
    for photo in (dreambench / "cat").iterdir():
        photo.unlink()
    (dreambench / "backpack" / "00.jpg").write_bytes(b"")
    protocol = load("dreambench", dreambench, pairs=[("cat", "backpack"), ("backpack", "bear_plushie")])
    groups = [group[0].group for group in protocol.groups()]
    assert groups == ["backpack", "pink_sunglasses", "bear_plushie", "backpack+bear_plushie"]
    assert [line.split(":")[0].rpartition("/")[2] for line in protocol.holes] == [
        "00.jpg",
        "subject cat",
        "pair cat and backpack",
    ]


def test_a_missing_folder_of_a_subject_is_a_hole(dreambench: Path) -> None:
    (dreambench / "cat").rename(dreambench.parent / "away")
    assert [*load("dreambench", dreambench).holes] == [f"subject cat: no folder {dreambench / 'cat'}; left out"]


def test_nothing_left_is_told_in_one_line(dreambench: Path) -> None:
    for photo in (dreambench / "cat").iterdir():
        photo.write_bytes(b"no picture")
    with pytest.raises(UserError, match="nothing is left to ask for.*not a picture that can be read"):
        load("dreambench", dreambench, subjects=("cat",))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"subjects": ("bakpack",)}, "protocol.subjects: no subject 'bakpack'; did you mean 'backpack'"),
        ({"subjects": ("cat", "cat")}, "stands there twice"),
        ({"subjects": 0}, "subjects=0"),
        ({"pairs": [("cat", "sunglasses")]}, "protocol.pairs: no subject 'sunglasses'; did you mean 'pink_sunglasses'"),
        ({"pairs": [("cat", "cat")]}, "cat with itself"),
        ({"pairs": [("cat", "backpack")] * 2}, "cat and backpack stand there twice"),
        ({"input_photos": {"cats": "00.jpg"}}, "protocol.input_photos: no subject 'cats'; did you mean 'cat'"),
        (
            {"input_photos": {"cat": "1.jpg"}},
            "protocol.input_photos.cat=1.jpg: no such photo of it; did you mean 01.jpg",
        ),
        ({"seeds": 0}, "nothing is asked for"),
    ],
)
def test_a_name_that_is_not_there_is_told_with_the_nearest_one(dreambench: Path, settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load("dreambench", dreambench, **settings)


def test_missing_files_of_dreambench_are_told(dreambench: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="protocol.folder: missing"):
        load_protocol(ProtocolSettings(kind="dreambench"))
    with pytest.raises(UserError, match="none: no such folder; give the one that holds prompts_and_classes.txt"):
        load("dreambench", tmp_path / "none")
    (dreambench / "prompts_and_classes.txt").write_text("Classes\n\ncat,cat\n")
    with pytest.raises(UserError, match="no object prompts found"):
        load("dreambench", dreambench)
    (dreambench / "prompts_and_classes.txt").unlink()
    with pytest.raises(UserError, match="prompts_and_classes.txt: cannot be read"):
        load("dreambench", dreambench)


def test_a_folder_takes_files_folders_and_words_for_names(tmp_path: Path, prompts: Path) -> None:
    folder = tmp_path / "photos"
    write_photo(folder / "dog2.png")
    write_photo(folder / "red_hat" / "b.jpg")
    write_photo(folder / "red_hat" / "a.jpg")
    write_photo(folder / "rex" / "1.webp")
    (folder / "notes.txt").write_text("not a photo")
    (folder / "subjects.yaml").write_text("rex: dog\nmimi: cat\n")
    protocol = load("folder", folder, prompts=prompts, pairs=2)
    subjects = {s.id: s for case in protocol.cases for s in case.subjects}
    assert {key: subject.noun for key, subject in subjects.items()} == {
        "dog2": "dog",
        "red_hat": "red hat",
        "rex": "dog",
    }
    assert [Path(photo.name).name for photo in subjects["red_hat"].photos] == ["a.jpg", "b.jpg"]
    assert protocol.holes == (
        "subject mimi: no photo of it; left out",
        "pair dog2 and mimi: a subject of it is missing; left out",
        "pair mimi and red_hat: a subject of it is missing; left out",
    )
    assert [case.prompt for case in protocol.cases if case.group == "red_hat"] == [
        "a red hat on the beach",
        "a red red hat",
    ]


def test_photos_come_upright_in_rgb_and_can_be_cut_out(tmp_path: Path, prompts: Path) -> None:
    picture = Image.open(write_photo(tmp_path / "sideways.png", size=(48, 40)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (tmp_path / "photos").mkdir()
    picture.save(tmp_path / "photos" / "cup.jpg", exif=exif)
    subject = load("folder", tmp_path / "photos", prompts=prompts).cases[0].subjects[0]
    photo = subject.photos[0].open()
    assert photo.mode == "RGB" and photo.size == (40, 48)
    alpha = np.array(subject.cutouts[0].getchannel("A"))
    assert alpha[24, 20] == 255 and alpha[0, 0] == 0


@pytest.mark.parametrize("names", [("my cat.png", "my_cat.png"), ("class.png", "dog.png"), ("cat/0.png", "cat.png")])
def test_names_that_would_share_files_are_refused(tmp_path: Path, prompts: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_photo(tmp_path / "photos" / name)
    with pytest.raises(UserError, match="share its files|is called the same"):
        load("folder", tmp_path / "photos", prompts=prompts)


def test_a_folder_without_subjects_or_words_is_told(tmp_path: Path, prompts: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    with pytest.raises(UserError, match="no subject found there"):
        load("folder", folder, prompts=prompts)
    photo = write_photo(folder / "0001.png")
    with pytest.raises(UserError, match="subject 0001: its name has no word"):
        load("folder", folder, prompts=prompts)
    (folder / "subjects.yaml").write_text("[dog]")
    with pytest.raises(UserError, match="expected a word for each subject"):
        load("folder", folder, prompts=prompts)
    (folder / "subjects.yaml").write_text("0001: dog")  # YAML reads a number
    photo.rename(folder / "rex.png")
    with pytest.raises(UserError, match="protocol.prompts: missing"):
        load("folder", folder)


def test_pairs_need_prompts_for_two(tmp_path: Path, prompts: Path) -> None:
    prompts.write_text("object: {new scene: ['a {}']}\n")
    for name in ("cat", "dog"):
        write_photo(tmp_path / "photos" / f"{name}.png")
    with pytest.raises(UserError, match="no prompts for pairs; add a section 'pair'"):
        load("folder", tmp_path / "photos", prompts=prompts, pairs=1)


def test_openimages_takes_two_flawless_boxes_of_a_class_from_two_pictures(tmp_path: Path, prompts: Path) -> None:
    folder = write_openimages(tmp_path / "openimages")
    protocol = load("openimages", folder, prompts=prompts)
    subjects = {case.group: case.subjects[0] for case in protocol.cases}
    assert sorted(subjects) == ["apple-1", "apple-2", "drill-1", "drill-2"]
    assert {subject.noun for subject in subjects.values()} == {"apple", "drill"}
    files = [subject.photos[0].name.split(" at ")[0] for subject in subjects.values()]
    assert len(set(files)) == 4 and not [file for file in files if file.endswith("0abc.jpg")]  # those are occluded
    assert protocol.holes == (f"{folder}: 2 of 296 classes have 2 boxes and pictures that can be used",)


def test_two_boxes_of_one_picture_are_not_two_entities(tmp_path: Path, prompts: Path) -> None:
    folder = write_openimages(tmp_path / "openimages", ("Apple", "Banana"))
    boxes = pandas.read_csv(folder / "test-annotations-bbox.csv", dtype=str)
    apples = boxes["LabelName"] == "/m/00"
    boxes.loc[apples, "ImageID"] = "01abc"
    boxes.loc[apples, "XMin"] = ["0.21", "0.22", "0.23", "0.24"]
    boxes.to_csv(folder / "test-annotations-bbox.csv", index=False)
    assert {case.subjects[0].noun for case in load("openimages", folder, prompts=prompts).cases} == {"banana"}


def test_openimages_photos_are_boxes_with_a_margin_and_their_masks(tmp_path: Path, prompts: Path) -> None:
    folder = write_openimages(tmp_path / "openimages")
    subject = load("openimages", folder, prompts=prompts).cases[0].subjects[0]
    photo = subject.photos[0]
    assert photo.open().size == (60, 48)  # half of 100 x 80 and a tenth on every side
    assert photo.mask is not None
    opaque = np.argwhere(np.array(subject.cutouts[0].getchannel("A")) > 127)  # the mask's 20 x 20 at (40, 30)
    assert opaque.min(axis=0).tolist() == [14, 20] and opaque.max(axis=0).tolist() == [33, 39]
    (folder / "test-annotations-object-segmentation.csv").unlink()
    assert load("openimages", folder, prompts=prompts).cases[0].subjects[0].photos[0].mask is None


def test_the_choice_depends_neither_on_the_order_of_rows_nor_on_pictures_it_does_not_use(
    tmp_path: Path, prompts: Path
) -> None:
    folder = write_openimages(tmp_path / "openimages", ("Apple", "Banana", "Human ear"), 6)
    photos = [case.subjects[0].photos[0].name for case in load("openimages", folder, prompts=prompts).cases]
    assert not [name for name in photos if "/2" in name.rpartition("images")[2]]  # parts of people are left out
    boxes = pandas.read_csv(folder / "test-annotations-bbox.csv", dtype=str)
    boxes.iloc[::-1].to_csv(folder / "test-annotations-bbox.csv", index=False)
    used = {name.split(" at ")[0] for name in photos}
    for file in (folder / "images").iterdir():
        if str(file) not in used:
            file.unlink()
    assert [case.subjects[0].photos[0].name for case in load("openimages", folder, prompts=prompts).cases] == photos


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("IsGroupOf", "1"),
        ("IsTruncated", "1"),
        ("IsDepiction", "1"),
        ("XMax", "0.40"),  # 0.075 of the picture
        ("YMax", "0.42"),  # 50 x 14 pixels
    ],
)
def test_openimages_passes_over_boxes_that_show_no_whole_thing(
    tmp_path: Path, prompts: Path, column: str, value: str
) -> None:
    folder = write_openimages(tmp_path / "openimages", ("Apple", "Banana"))
    boxes = pandas.read_csv(folder / "test-annotations-bbox.csv", dtype=str)
    boxes.loc[boxes["LabelName"] == "/m/00", column] = value
    boxes.to_csv(folder / "test-annotations-bbox.csv", index=False)
    assert {case.subjects[0].noun for case in load("openimages", folder, prompts=prompts).cases} == {"banana"}


def test_openimages_files_that_lack_something_are_told(tmp_path: Path, prompts: Path) -> None:
    folder = write_openimages(tmp_path / "openimages")
    boxes = folder / "test-annotations-bbox.csv"
    whole = pandas.read_csv(boxes, dtype=str)
    whole.drop(columns="IsDepiction").to_csv(boxes, index=False)
    with pytest.raises(UserError, match="test-annotations-bbox.csv: no column IsDepiction"):
        load("openimages", folder, prompts=prompts)
    boxes.write_text("")
    with pytest.raises(UserError, match="no table that can be read"):
        load("openimages", folder, prompts=prompts)
    boxes.unlink()
    with pytest.raises(UserError, match="test-annotations-bbox.csv: cannot be read"):
        load("openimages", folder, prompts=prompts)
    (folder / "images").rename(tmp_path / "away")
    with pytest.raises(UserError, match="images: no such folder"):
        load("openimages", folder, prompts=prompts)


def test_a_mask_that_is_not_there_is_a_hole_and_grabcut_takes_its_place(tmp_path: Path, prompts: Path) -> None:
    folder = write_openimages(tmp_path / "openimages")
    for file in (folder / "masks").iterdir():
        file.unlink()
    protocol = load("openimages", folder, prompts=prompts, subjects=1)
    assert protocol.cases[0].subjects[0].photos[0].mask is None
    assert "no such mask; GrabCut takes its place" in protocol.holes[-1]


def test_class_words_are_spread_evenly_and_keep_their_seeds(dreambench: Path) -> None:
    protocol = load("dreambench", dreambench)
    cases = class_cases(protocol, 10)
    assert len(cases) == 10 == len({case.seed for case in cases})
    assert {case.part for case in cases} == {"class"}
    assert [subject.id for case in cases for subject in case.tuned_to] == [
        case.group.removeprefix("class--") for case in cases
    ]
    subjects = {subject.id: subject.noun for case in protocol.cases for subject in case.subjects}
    assert {case.group: case.prompt for case in cases} == {
        f"class--{name}": with_article(noun) for name, noun in subjects.items()
    }
    assert sorted(Counter(case.group for case in cases).values(), reverse=True) == [3, 3, 2, 2]
    fewer = {case.id: case.seed for case in class_cases(load("dreambench", dreambench, subjects=("cat",)), 2)}
    assert fewer.items() <= {case.id: case.seed for case in cases}.items()


def test_photos_to_tune_from_are_no_others_and_one_is_held_back(tmp_path: Path, prompts: Path) -> None:
    for i in range(4):
        write_photo(tmp_path / "cat" / f"{i}.png")
    write_photo(tmp_path / "dog.png")

    def tuned(photos: int) -> dict[str, tuple[int, int]]:
        protocol = load("folder", tmp_path, prompts=prompts, tuning_photos=photos)
        subjects = {subject.id: subject for case in protocol.cases for subject in case.subjects}
        for subject in subjects.values():
            assert not {photo.name for photo in subject.tuning} & {photo.name for photo in subject.others}
        return {name: (len(subject.tuning), len(subject.others)) for name, subject in subjects.items()}

    assert tuned(0) == {"cat": (0, 3), "dog": (0, 0)}
    assert tuned(2) == {"cat": (2, 2), "dog": (1, 0)}
    assert tuned(5) == {"cat": (3, 1), "dog": (1, 0)}
