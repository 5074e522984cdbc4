"""Noun chunks scored by their own tokens: what the detector reads, whose tokens are whose, golden scores."""

from __future__ import annotations

import pytest
import torch
from transformers import BertTokenizerFast

from data_pipeline.stages.detect.chunk_scores import clean_phrase, phrase_text, score_chunks, token_indices
from tests.data_pipeline.stages.tiny_grounding_dino import word_piece_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    return word_piece_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def own_tokens(tokenizer: BertTokenizerFast, *chunks: str) -> list[list[str]]:
    """The tokens that each chunk is scored by, spelled out."""
    asked = phrase_text(chunks, tokenizer)
    read = tokenizer(asked.text, return_offsets_mapping=True)
    indices = token_indices(asked.spans, read["offset_mapping"])
    names = tokenizer.convert_ids_to_tokens(read["input_ids"])
    return [[names[i] for i in indices[slot]] if slot is not None else [] for slot in asked.slots]


@pytest.mark.parametrize(
    ("chunk", "phrase"),
    [
        ("a red sports car", "red sports car"),
        ("The Eiffel Tower", "eiffel tower"),
        ("all of the dogs", "of the dogs"),
        ("all the dogs", "dogs"),
        ("his dog", "dog"),
        ("two dogs", "two dogs"),
        ("a St. Bernard", "st bernard"),
        ("the  what?\n cat", "what cat"),
        ("[SEP] dog", "[sep] dog"),
        ("another", ""),
        ("...", ""),
    ],
)
def test_a_phrase_is_lower_case_without_leading_determiner_or_separator(chunk: str, phrase: str) -> None:
    assert clean_phrase(chunk) == phrase


def test_each_distinct_phrase_stands_once_with_a_full_stop(tokenizer: BertTokenizerFast) -> None:
    asked = phrase_text(["A dog", "a red sports car", "the dog"], tokenizer)
    assert asked.text == "dog . red sports car ."
    assert [asked.text[start:end] for start, end in asked.spans] == ["dog", "red sports car"]
    assert asked.slots == (0, 1, 0)


def test_without_a_phrase_there_is_nothing_to_look_for(tokenizer: BertTokenizerFast) -> None:
    assert phrase_text(["the", "?!".replace("!", "")], tokenizer).text == ""
    assert phrase_text(["the", "dog"], tokenizer).slots == (None, 0)


def test_what_does_not_fit_is_left_out_and_the_rest_stays(tokenizer: BertTokenizerFast) -> None:
    # [CLS] dog . | red sports car . | cat . [SEP]: 2 + 2 + 4 + 2 tokens
    chunks = ["dog", "red sports car", "cat"]
    assert phrase_text(chunks, tokenizer, max_tokens=10).slots == (0, 1, 2)
    short = phrase_text(chunks, tokenizer, max_tokens=9)
    assert short.slots == (0, 1, None) and len(tokenizer(short.text)["input_ids"]) == 8
    assert phrase_text(chunks, tokenizer, max_tokens=6).slots == (0, None, 1)
    many = phrase_text([f"{'dog ' * (1 + i)}" for i in range(60)], tokenizer)
    assert len(tokenizer(many.text)["input_ids"]) <= 256


def test_a_chunk_has_all_its_own_tokens_and_no_others(tokenizer: BertTokenizerFast) -> None:
    assert own_tokens(tokenizer, "a plant", "a flower pot") == [["plant"], ["flower", "pot"]]
    assert own_tokens(tokenizer, "plant", "flower", "a plant") == [["plant"], ["flower"], ["plant"]]


def test_word_pieces_stay_together(tokenizer: BertTokenizerFast) -> None:
    assert own_tokens(tokenizer, "a minivan", "the van") == [["mini", "##van"], ["van"]]


def test_accents_hyphens_and_unknown_signs_keep_their_places(tokenizer: BertTokenizerFast) -> None:
    assert own_tokens(tokenizer, "a CAFÉ dog", "red-car", "Ǆ☃ cat") == [
        ["cafe", "dog"],
        ["red", "-", "car"],
        ["[UNK]", "cat"],
    ]


def test_a_chunks_scores_are_the_best_and_the_mean_of_its_tokens() -> None:
    # sigmoid: 0 -> 0.5, ln 3 -> 0.75, -ln 3 -> 0.25, ln 9 -> 0.9
    three, nine = torch.tensor(3.0).log(), torch.tensor(9.0).log()
    logits = torch.tensor([[5.0, 0.0, three, -three, 5.0, -torch.inf], [5.0, nine, 0.0, 0.0, 5.0, -torch.inf]])
    token_scores, chunk_scores = score_chunks(logits, [[1], [2, 3], [], [1, 2, 3]])
    torch.testing.assert_close(token_scores, torch.tensor([[0.5, 0.75, 0.0, 0.75], [0.9, 0.5, 0.0, 0.9]]))
    torch.testing.assert_close(chunk_scores, torch.tensor([[0.5, 0.5, 0.0, 0.5], [0.9, 0.5, 0.0, 1.9 / 3]]))


def test_neighbours_above_every_threshold_are_not_merged(tokenizer: BertTokenizerFast) -> None:
    """Where decoding would say "plant flower", the flower's box is the flower's."""
    asked = phrase_text(["a plant", "a flower pot"], tokenizer)
    read = tokenizer(asked.text, return_offsets_mapping=True)  # [CLS] plant . flower pot . [SEP]
    logits = torch.full((2, len(read["input_ids"])), -9.0)
    logits[0, [1, 3]] = torch.tensor([1.0, 0.9])
    logits[1, [3, 4]] = torch.tensor([2.0, 1.5])
    _, scores = score_chunks(logits, token_indices(asked.spans, read["offset_mapping"]))
    assert scores.argmax(dim=1).tolist() == [0, 1]


def test_half_precision_logits_give_float32_scores() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        assert all(scores.dtype == torch.float32 for scores in score_chunks(torch.zeros(2, 3, dtype=dtype), [[1]]))


def test_no_chunks_give_no_columns() -> None:
    assert [tuple(scores.shape) for scores in score_chunks(torch.zeros(4, 3), [])] == [(4, 0), (4, 0)]
