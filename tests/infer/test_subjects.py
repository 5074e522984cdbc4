"""The `--subject` grammar, and which mention of a noun belongs to which subject."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.errors import UserError
from infer.subjects import Subject, match_nouns, parse_subject


def subject(noun: str, occurrence: int | None = None) -> Subject:
    return Subject(noun, [Image.new("RGBA", (4, 4), (255, 0, 0, 255))], occurrence=occurrence)


def test_a_name_and_a_file_are_enough() -> None:
    parsed = parse_subject("dog=dog.png")
    assert (parsed.noun, parsed.files, parsed.box, parsed.strength, parsed.occurrence) == (
        "dog",
        (Path("dog.png"),),
        None,
        1.0,
        None,
    )


def test_files_box_and_strength_are_read_together() -> None:
    parsed = parse_subject("teddy bear#2=a.png,b.png@0.1,0.2,.5,1:strength=0.8")
    assert parsed.noun == "teddy bear" and parsed.occurrence == 2
    assert parsed.files == (Path("a.png"), Path("b.png"))
    assert parsed.box == (0.1, 0.2, 0.5, 1.0) and parsed.strength == 0.8


def test_options_may_stand_in_any_order_with_masks() -> None:
    parsed = parse_subject("dog=a.png,b.png@0,0,1,1:mask=ma.png,mb.png:strength=2")
    assert parsed.masks == (Path("ma.png"), Path("mb.png")) and parsed.strength == 2


def test_an_at_sign_inside_a_file_name_is_not_a_box() -> None:
    assert parse_subject("dog=dog@2x.png").files == (Path("dog@2x.png"),)
    assert parse_subject("dog=dog@2x.png,b.png@0,0,1,1").box == (0, 0, 1, 1)


def test_an_existing_file_wins_over_reading_its_name_as_a_box(tmp_path: Path) -> None:
    odd = tmp_path / "dog@3"
    odd.touch()
    assert parse_subject(f"dog={odd}").files == (odd,)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("dog", "expected NAME=FILE"),
        ("=dog.png", "expected NAME=FILE"),
        ("dog=", "expected NAME=FILE"),
        ("dog=@0,0,1,1", "no file given"),
        ("dog#0=dog.png", "expected NAME#K"),
        ("dog#two=dog.png", "expected NAME#K"),
        ("dog=dog.png@0,0,1", "four numbers x0,y0,x1,y1, got 3"),
        ("dog=dog.png@0,0,1,one", "is not four numbers"),
        ("dog=dog.png@0,0,1.2,1", "leaves the picture"),
        ("dog=dog.png@-0.1,0,1,1", "leaves the picture"),
        ("dog=dog.png@0,0,nan,1", "leaves the picture"),
        ("dog=dog.png@0.5,0,0.2,1", "upside down"),
        ("dog=dog.png@0,0.5,1,0.5", "upside down"),
        ("dog=dog.png:strength=3", "expected 0 (off) to 2"),
        ("dog=dog.png:strength=-1", "expected 0 (off) to 2"),
        ("dog=dog.png:strength=nan", "expected 0 (off) to 2"),
        ("dog=dog.png:strength=much", "no number"),
        ("dog=dog.png:colour=red", "unknown option :colour="),
        ("dog=a.png,b.png:mask=m.png", "1 masks for 2 files"),
    ],
)
def test_a_mistake_in_the_argument_is_told_in_one_line_that_repeats_it(text: str, complaint: str) -> None:
    with pytest.raises(UserError) as error:
        parse_subject(text)
    assert complaint in str(error.value) and text in str(error.value) and "\n" not in str(error.value)


def test_a_noun_is_found_as_a_whole_word_in_either_case() -> None:
    assert match_nouns("Hotdog stand, a Dog runs", [subject("dog")]) == [(16, 19)]


def test_a_noun_of_several_words_is_found_over_any_spacing() -> None:
    assert match_nouns("a teddy  bear", [subject("teddy bear")]) == [(2, 13)]


def test_subjects_of_one_noun_take_its_mentions_in_turn() -> None:
    assert match_nouns("a dog and a dog", [subject("dog"), subject("dog")]) == [(2, 5), (12, 15)]


def test_an_occurrence_chooses_its_mention_and_the_rest_is_left_to_others() -> None:
    assert match_nouns("a dog and a dog", [subject("dog"), subject("dog", 1)]) == [(12, 15), (2, 5)]


def test_a_plural_serves_several_subjects() -> None:
    assert match_nouns("two dogs", [subject("dog"), subject("dog")]) == [(4, 7), (4, 7)]


@pytest.mark.parametrize(
    ("prompt", "subjects", "complaint"),
    [
        ("a cat", [subject("dog")], "lacks the word 'dog'"),
        ("a dogma", [subject("dog")], "lacks the word 'dog'"),
        ("a dog", [subject("dog", 2)], "has 'dog' 1 time(s)"),
        ("a dog", [subject("dog"), subject("dog")], "has 'dog' 1 time(s)"),
        ("a dog and a dog", [subject("dog", 1), subject("dog", 1)], "dog#1: given 2 times"),
    ],
)
def test_a_noun_mentioned_too_rarely_is_refused(prompt: str, subjects: list[Subject], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint.replace("(", r"\(").replace(")", r"\)")):
        match_nouns(prompt, subjects)
