"""model/learned_words.py: placeholders as tokens, their vectors in the prompt, states of words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from model.composition import SubjectDiffusionModel
from model.learned_words import LearnedWord, LearnedWords, add_words
from model.prompt import PromptError, encode_ids
from model.text_fusion import WordRows, encode_prompt
from tests.model.tiny import LATENTS, TEXT_WIDTH, tiny_subject_model, tiny_text_encoder
from tests.model.tiny_inputs import tiny_inputs
from tests.model.tiny_tokenizer import tiny_tokenizer
from tests.model.tiny_words import lasr_word, plain_word

SIZE = (LATENTS[1], LATENTS[2])


def rows(count: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def two_words(tokenizer) -> LearnedWords:
    z = LearnedWord.plain("z", add_words(tokenizer, "z", 2), rows(2))
    return LearnedWords([z, LearnedWord.plain("new1", add_words(tokenizer, "new1"), rows(1, seed=1))])


# --- tokens


def test_ids_lie_above_the_placeholder_of_subjects_one_a_vector() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = tiny_text_encoder().config.vocab_size
    assert add_words(tokenizer, "z", 2) == (vocabulary + 1, vocabulary + 2)
    assert add_words(tokenizer, "y") == (vocabulary + 3,)


def test_whole_words_in_either_case_are_expanded_and_become_one_token_a_vector() -> None:
    tokenizer = tiny_tokenizer()
    words = two_words(tokenizer)
    assert words.expand("a z, Z's new1 and a zoo of new12") == "a <z:0><z:1>, <z:0><z:1>'s <new1:0> and a zoo of new12"
    first, second, third = words.ids.tolist()
    dog = encode_ids(tokenizer, "a dog on").tolist()
    assert encode_ids(tokenizer, words.expand("a z on")).tolist()[:5] == [*dog[:2], first, second, dog[3]]
    assert third in encode_ids(tokenizer, words.expand("new1"))


def test_expanding_twice_changes_nothing() -> None:
    words = two_words(tiny_tokenizer())
    once = words.expand("a z and a new1")
    assert words.expand(once) == once


@pytest.mark.parametrize(
    ("placeholder", "message"),
    [
        ("dog", "is an ordinary word"),
        ("DOG", "is an ordinary word"),
        ("an apple", "one word without blanks"),
        ("", "one word without blanks"),
        ("<subject>", "reserved token <subject>"),
        ("a<|endoftext|>", "reserved token"),
        ("-", "needs a letter or a digit"),
        ("zebrafish", "is an ordinary word"),
    ],
)
def test_placeholders_that_cannot_be_told_from_other_words_are_refused(placeholder, message) -> None:
    with pytest.raises(PromptError, match=message):
        add_words(tiny_tokenizer(), placeholder, common_words=["zebrafish"])


def test_a_placeholder_is_added_once() -> None:
    tokenizer = tiny_tokenizer()
    add_words(tokenizer, "z")
    with pytest.raises(PromptError, match="'Z': was added before"):
        add_words(tokenizer, "Z")


def test_words_that_do_not_fit_together_are_refused() -> None:
    word = LearnedWord.plain("z", (9,), rows())
    with pytest.raises(ValueError, match="'z' is there twice"):
        LearnedWords([word, LearnedWord.plain("Z", (10,), rows())])
    with pytest.raises(ValueError, match="different bases"):
        LearnedWords([word, LearnedWord.plain("y", (10,), torch.zeros(1, TEXT_WIDTH + 1))])
    with pytest.raises(ValueError, match="give one row a token"):
        LearnedWord.plain("z", (9, 10), rows())


# --- vectors in the prompt


def test_a_words_own_embedding_as_vector_equals_the_word() -> None:
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    dog = encode_ids(tokenizer, "dog")[1]
    own = LearnedWord.plain("z", add_words(tokenizer, "z"), encoder.embeddings.token_embedding.weight[dog][None])
    words = LearnedWords([own])
    ids = encode_ids(tokenizer, words.expand("a z on the beach"))[None]
    none = torch.zeros(1, 0, dtype=torch.int64)
    expected = encoder(encode_ids(tokenizer, "a dog on the beach")[None]).last_hidden_state
    torch.testing.assert_close(encode_prompt(encoder, ids, None, none, words=words.word_rows()), expected)


@pytest.mark.parametrize("fusion", ["before", "after"])
def test_words_and_concepts_stand_each_in_their_places(fusion) -> None:
    encoder, vocabulary = tiny_text_encoder(), tiny_text_encoder().config.vocab_size
    table = encoder.embeddings.token_embedding.weight
    plain = torch.arange(3, 11)[None]
    ids = plain.clone()
    ids[0, 2], ids[0, 5] = vocabulary + 1, vocabulary  # a word, then a subject
    words = WordRows(torch.tensor([vocabulary + 1]), table[plain[0, 2]][None])
    concept, place = table[plain[0, 5]][None, None], torch.tensor([[5]])
    found = encode_prompt(encoder, ids, concept, place, fusion, words=words)
    expected = encode_prompt(encoder, torch.where(ids == vocabulary, ids, plain), concept, place, fusion)
    torch.testing.assert_close(found, expected)


def test_gradients_reach_the_vectors_and_prompts_may_have_vectors_of_their_own() -> None:
    encoder = tiny_text_encoder()
    ids = torch.tensor([[1, 999, 2], [1, 999, 2]])
    each = torch.randn(2, 1, TEXT_WIDTH, requires_grad=True)
    none = torch.zeros(2, 0, dtype=torch.int64)
    states = encode_prompt(encoder, ids, None, none, words=WordRows(torch.tensor([999]), each))
    assert not torch.allclose(states[0], states[1])
    states[0].square().sum().backward()
    assert each.grad[0].abs().max() > 0 and each.grad[1].abs().max() == 0


# --- in the model


@pytest.fixture
def model() -> SubjectDiffusionModel:
    return tiny_subject_model()


@torch.no_grad()
def predict(model: SubjectDiffusionModel, inputs) -> torch.Tensor:
    latents = torch.randn(len(inputs), *LATENTS, generator=torch.Generator().manual_seed(1))
    return model.denoise(latents, torch.tensor(500), *model.encode(inputs, SIZE))


def test_words_that_no_prompt_holds_change_nothing_bit_for_bit(model) -> None:
    inputs, tokenizer = tiny_inputs(), tiny_tokenizer()
    without = predict(model, inputs)
    model.words = LearnedWords([plain_word(model, tokenizer, "z"), lasr_word(model, tokenizer, "y")])
    assert torch.equal(predict(model, inputs), without)
    model.words = None
    assert torch.equal(predict(model, inputs), without)


def test_a_word_beside_subjects_changes_its_own_picture_only(model) -> None:
    inputs, tokenizer = tiny_inputs(), tiny_tokenizer()
    model.words = LearnedWords([plain_word(model, tokenizer, "z", vectors=2)])
    ids = inputs.input_ids.clone()
    ids[0, 1:3] = model.words.ids
    without, found = predict(model, inputs), predict(model, replace(inputs, input_ids=ids))
    assert not torch.allclose(found[0], without[0], atol=1e-3)
    assert torch.equal(found[1], without[1])


def test_words_are_trained_by_name(model) -> None:
    model.words = LearnedWords([plain_word(model, tiny_tokenizer(), "z")])
    assert model.set_trainable([r"words\..*"]) == ["words.each.0.static.rows"]


def test_the_scale_multiplies_every_vector() -> None:
    assert torch.equal(LearnedWord.plain("z", (9,), rows(), scale=2.0).static_rows(), 2 * rows())


# --- states


@pytest.mark.parametrize("attention", [False, True])
def test_a_word_comes_back_from_its_state_under_another_name(model, attention) -> None:
    word = lasr_word(model, tiny_tokenizer(), "z", vectors=2, attention=attention)
    word.adaptive_weight, word.scale = 0.25, 1.5
    again = LearnedWord.from_state("y", (700, 701), word.state())
    assert (again.placeholder, again.ids, again.adaptive_weight, again.scale) == ("y", (700, 701), 0.25, 1.5)
    torch.testing.assert_close(again.static_rows(), word.static_rows(), rtol=0, atol=0)
    assert again.state().keys() == word.state().keys()
    assert all(torch.equal(value, again.state()[name]) for name, value in word.state().items())


@pytest.mark.parametrize("shape", [(2, 24), (8, 2, 24)])
def test_plain_and_layerwise_rows_come_back(shape) -> None:
    word = LearnedWord.plain("z", (5, 6), torch.randn(shape))
    assert torch.equal(LearnedWord.from_state("z", (5, 6), word.state()).static_rows(), word.static_rows())


def test_tensors_that_make_no_word_are_refused() -> None:
    with pytest.raises(ValueError, match="'z': its tensors make no learned word"):
        LearnedWord.from_state("z", (5,), {"weights": torch.zeros(3)})
