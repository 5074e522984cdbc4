"""Which box shows which phrase: one box for a thing, and what the caption says of places."""

from __future__ import annotations

import math

import numpy as np
import pytest

from data_pipeline.stages import NounChunk
from data_pipeline.stages.detect.placement import place_chunks, place_score, read_places, relation_score

LEFT, RIGHT = (10, 40, 30, 60), (70, 40, 90, 60)


def chunk(text: str, following: str = "", noun: str = "") -> NounChunk:
    return NounChunk(text, noun or text.split()[-1], (0, len(text)), following)


def placed(scores: list[list[float]], boxes: list[tuple[int, ...]], *chunks: NounChunk, least: float = 0.25):
    return place_chunks(np.array(scores), np.array(boxes, float), (100, 100), chunks, least)


def test_places_and_relations_are_read_from_the_words_between_phrases() -> None:
    said = read_places([chunk("dog", " on the left and a "), chunk("cat", " at the top")])
    assert said.places == {0: "left", 1: "top"} and said.relations == {}
    said = read_places([chunk("dog", " to the left of a "), chunk("cat", " above two "), chunk("cars", "")])
    assert said.places == {} and said.relations == {0: (-1, 0), 1: (0, -1)}


def test_a_place_after_the_last_comma_is_that_of_the_first_phrase() -> None:
    assert read_places([chunk("dog", " in the "), chunk("snow", ", on the right")]).places == {0: "right"}
    assert read_places([chunk("dog", ", on the right")]).places == {0: "right"}


def test_a_relation_after_the_last_phrase_says_nothing() -> None:
    assert read_places([chunk("dog", " above")]).relations == {}


def test_scores_of_places_and_relations() -> None:
    offset = np.array([[0.1, 0.0], [-0.1, 0.0], [0.0, 0.3]])
    sure = 1 / (1 + math.exp(-1.4))  # 0.80: a tenth of the picture to the left
    expected = [math.log(0.9 * 2 * (1 - sure) + 0.1), math.log(0.9 * 2 * sure + 0.1), 0.0]
    assert relation_score((-1, 0), offset) == pytest.approx(expected)
    assert place_score("left", offset + 0.5) == pytest.approx(expected)
    middle = [math.log(1.9), math.log(1.8 * math.exp(-0.5) + 0.1)]
    assert place_score("middle", np.array([[0.5, 0.5], [0.65, 0.5]])) == pytest.approx(middle)


def test_a_phrase_in_the_singular_gets_its_best_box_only() -> None:
    assert placed([[0.6], [0.7]], [LEFT, RIGHT], chunk("dog")) == [(1, 0)]


def test_a_phrase_in_the_plural_gets_all_that_fit() -> None:
    assert placed([[0.6], [0.7]], [LEFT, RIGHT], chunk("dogs", noun="dog")) == [(1, 0), (0, 0)]
    assert placed([[0.6], [0.7]], [LEFT, RIGHT], chunk("two sheep", noun="sheep")) == [(1, 0), (0, 0)]
    assert placed([[0.1], [0.7]], [LEFT, RIGHT], chunk("dogs", noun="dog")) == [(1, 0)]


def test_two_phrases_share_the_boxes_as_is_best_for_both() -> None:
    # both fit the first box best, but together they fit better the other way round
    scores = [[0.8, 0.9], [0.3, 0.8]]
    assert placed(scores, [LEFT, RIGHT], chunk("dog"), chunk("cat")) == [(0, 0), (1, 1)]


def test_a_part_of_a_thing_is_no_second_thing() -> None:
    assert placed([[0.9, 0.2], [0.3, 0.5]], [(0, 0, 60, 60), (0, 0, 20, 20)], chunk("dog"), chunk("nose")) == [(0, 0)]


def test_a_phrase_that_fits_nothing_has_no_box() -> None:
    assert placed([[0.9, 0.24]], [LEFT], chunk("dog"), chunk("cat")) == [(0, 0)]
    assert placed([[0.2]], [LEFT], chunk("dog")) == []


def test_what_the_caption_says_decides_where_the_pictures_do_not() -> None:
    scores = [[0.5, 0.45], [0.45, 0.5]]
    both = [LEFT, RIGHT]
    assert placed(scores, both, chunk("dog", " next to a "), chunk("cat")) == [(0, 0), (1, 1)]
    assert placed(scores, both, chunk("dog", " to the right of a "), chunk("cat")) == [(1, 0), (0, 1)]
    assert placed(scores, both, chunk("dog", " on the right and a "), chunk("cat")) == [(1, 0), (0, 1)]


def test_what_the_caption_says_does_not_overrule_what_is_plain_to_see() -> None:
    scores = [[0.9, 0.0], [0.0, 0.9]]
    pairs = placed(scores, [LEFT, RIGHT], chunk("dog", " to the right of a "), chunk("cat"))
    assert pairs == [(0, 0)]  # rather one of them than both the wrong way round


@pytest.mark.parametrize(("boxes", "chunks"), [(0, 2), (2, 0), (0, 0)])
def test_no_boxes_or_no_phrases_give_no_pairs(boxes: int, chunks: int) -> None:
    scores = np.zeros((boxes, chunks))
    assert place_chunks(scores, np.zeros((boxes, 4)), (9, 9), [chunk("dog")] * chunks, 0.25) == []
