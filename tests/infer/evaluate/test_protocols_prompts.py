"""infer/evaluate/protocols/prompts.py: lists by kind, and templates that agree with their nouns."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.errors import UserError
from infer.evaluate.cases import KINDS
from infer.evaluate.protocols.prompts import fill, load_prompts, with_article
from infer.subjects import Subject, match_nouns

LISTS = Path("configs/eval/prompts")


def written(folder: Path, text: str) -> Path:
    file = folder / "prompts.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("template", "nouns", "prompt"),
    [
        ("a {} in the jungle", ["dog"], "a dog in the jungle"),
        ("a {} in the jungle", ["owl"], "an owl in the jungle"),
        ("an {}", ["dog"], "a dog"),
        ("a {}", ["unicorn"], "a unicorn"),
        ("a {}", ["hourglass"], "an hourglass"),
        ("a red {}", ["owl"], "a red owl"),
        ("a {} in a box", ["glasses"], "glasses in a box"),
        ("a very red {}", ["glasses"], "very red glasses"),
        ("a photo of a {}", ["glasses"], "a photo of glasses"),
        ("a photo of the {}", ["glasses"], "a photo of the glasses"),
        ("an oil painting of a {} and a {}", ["owl", "glasses"], "an oil painting of an owl and glasses"),
        ("a red {} and a red {}", ["cat", "apple"], "a red cat and a red apple"),
        ("a {} and a {}", ["dog", "dog"], "a dog and another dog"),
        ("a cube shaped {}", ["apple"], "a cube shaped apple"),
    ],
)
def test_articles_agree_with_the_noun(template: str, nouns: list[str], prompt: str) -> None:
    assert fill(template, nouns) == prompt


def test_a_bare_word_gets_its_article() -> None:
    assert [with_article(noun) for noun in ("apple", "dress", "socks")] == ["an apple", "a dress", "socks"]


def test_living_subjects_have_a_list_of_their_own(tmp_path: Path) -> None:
    file = written(
        tmp_path, "object: {new scene: ['a {} in a box']}\nlive: {expression: ['a happy {}']}\nlive nouns: [Dog]\n"
    )
    prompts = load_prompts(file)
    assert [prompt.template for prompt in prompts.of("dog")] == ["a happy {}"]
    assert [prompt.kind for prompt in prompts.of("teapot")] == ["new scene"]


def test_a_list_without_living_subjects_serves_all(tmp_path: Path) -> None:
    prompts = load_prompts(written(tmp_path, "object: {new scene: ['a {} in a box']}\nlive nouns: [dog]\n"))
    assert prompts.of("dog") == prompts.object


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("object: {new scene: [a dog on the beach]}", r"expected \{\} once"),
        ("object: {new scene: ['a {} and a {}']}", r"expected \{\} once"),
        ("object: {new scene: ['a {} {']}", r"expected \{\} once"),
        ("object: {new scene: ['a {}']}\npair: {relation: ['a {}']}", r"expected \{\} 2 times"),
        ("object: {new scenes: ['a {}']}", "unknown kind of prompt 'new scenes'; did you mean 'new scene'"),
        ("objects: {new scene: ['a {}']}", "unknown section 'objects'; did you mean 'object'"),
        ("object: {new scene: ['a {} {colour}']}", r"nothing is known of \{colour\}"),
        ("object: {new scene: a dog}", "expected a list of texts"),
        ("object: [a dog]", "expected kinds of prompts"),
        ("- a dog", "expected the sections"),
        ("live: {new scene: ['a {}']}", "no prompts in section 'object'"),
        ("object: {", "not valid YAML"),
    ],
)
def test_a_list_that_cannot_be_used_is_told_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as told:
        load_prompts(written(tmp_path, text))
    assert "\n" not in str(told.value) and "prompts.yaml" in str(told.value)


def test_a_missing_list_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none.yaml: cannot be read"):
        load_prompts(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="protocol.prompts: missing"):
        load_prompts(None)


def test_our_general_list_has_three_prompts_of_every_kind_for_things_and_for_the_living() -> None:
    prompts = load_prompts(LISTS / "general.yaml")
    for chosen in (prompts.object, prompts.live):
        kinds = [prompt.kind for prompt in chosen]
        assert all(kinds.count(kind) >= 3 for kind in KINDS)
        assert len({prompt.template for prompt in chosen}) == len(chosen)
    assert {"dog", "woman"} <= prompts.live_nouns


@pytest.mark.parametrize("name", ["general.yaml", "openimages.yaml"])
@pytest.mark.parametrize("noun", ["dog", "owl", "stuffed animal", "glasses"])
def test_our_lists_name_the_subject_as_the_pipeline_demands(name: str, noun: str) -> None:
    prompts = load_prompts(LISTS / name)
    for prompt in (*prompts.object, *prompts.live):
        text = fill(prompt.template, [noun])
        start, end = match_nouns(text, [Subject(noun, [])])[0]
        assert text[start:end] == noun and " a glasses" not in f" {text}" and "  " not in text
    for prompt in prompts.pair:
        match_nouns(fill(prompt.template, [noun, "teapot"]), [Subject(noun, []), Subject("teapot", [])])
