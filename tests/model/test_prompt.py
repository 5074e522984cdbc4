"""model/prompt.py: the prompt with subjects and where its tokens lie."""

from __future__ import annotations

import pytest
import torch

from model.prompt import PLACEHOLDER, PromptError, SubjectPrompt, add_placeholder, build_prompt, encode_ids
from model.prompt import supervised_weights as weights_of
from tests.model.tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def text_at(tokenizer, prompt: SubjectPrompt, positions: tuple[int, ...]) -> str:
    """The characters that the tokens at these positions spell."""
    pieces = tokenizer.convert_ids_to_tokens(prompt.input_ids[list(positions)].tolist())
    return "".join(pieces).replace("</w>", " ").strip()


# --- the placeholder


def test_the_placeholder_id_is_the_vocabulary_size() -> None:
    tokenizer = tiny_tokenizer(placeholder=False)
    size = len(tokenizer)
    assert add_placeholder(tokenizer) == size


def test_adding_the_placeholder_twice_changes_nothing(tokenizer) -> None:
    size = len(tokenizer)
    assert add_placeholder(tokenizer) == size - 1
    assert len(tokenizer) == size


def test_a_saved_tokenizer_keeps_the_placeholder(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path)
    assert add_placeholder(type(tokenizer).from_pretrained(tmp_path)) == len(tokenizer) - 1


# --- the text and its positions


def test_the_suffix_names_every_subject_in_order(tokenizer) -> None:
    prompt = build_prompt(tokenizer, "a dog on the beach", ["dog", "red mug"])
    assert prompt.text == "a dog on the beach, the dog is <subject>, the red mug is <subject>"


def test_an_empty_caption_leaves_the_suffix_alone(tokenizer) -> None:
    assert build_prompt(tokenizer, "", ["dog"]).text == "the dog is <subject>"


def test_no_nouns_give_the_plain_caption(tokenizer) -> None:
    prompt = build_prompt(tokenizer, "a dog on the beach", [])
    assert torch.equal(prompt.input_ids, prompt.plain_input_ids)
    assert prompt.placeholder_positions == ()


def test_placeholders_stand_at_their_id_and_nowhere_else(tokenizer) -> None:
    prompt = build_prompt(tokenizer, "a dog next to a mug", ["dog", "mug"])
    is_placeholder = prompt.input_ids == add_placeholder(tokenizer)
    assert tuple(is_placeholder.nonzero().flatten().tolist()) == prompt.placeholder_positions
    assert len(prompt.placeholder_positions) == 2


@pytest.mark.parametrize("noun", ["dog", "teddy bear", "zebra", "fire-engine", "dog's toy", "café", "mug 7", "T.V."])
def test_every_sub_token_of_the_noun_is_found(tokenizer, noun) -> None:
    prompt = build_prompt(tokenizer, "a thing on the beach", [noun])
    found = text_at(tokenizer, prompt, prompt.noun_positions[0])
    expected = "".join(tokenizer.tokenize(noun)).replace("</w>", " ").strip()
    assert found == expected
    assert prompt.noun_ids[0] == tuple(prompt.input_ids[list(prompt.noun_positions[0])].tolist())
    assert prompt.noun_positions[0][-1] + 2 == prompt.placeholder_positions[0], "'is' stands between them"


@pytest.mark.parametrize("caption", ["a dog!", "a dog...", "a dog, ", "  a dog,,", "a Dog?!", "a dog"])
def test_positions_hold_when_the_caption_merges_with_the_suffix(tokenizer, caption) -> None:
    start = caption.lower().index("dog")
    prompt = build_prompt(tokenizer, caption, ["dog"], spans=[(start, start + 3)])
    assert text_at(tokenizer, prompt, prompt.caption_noun_positions[0]) == "dog"
    assert text_at(tokenizer, prompt, prompt.noun_positions[0]) == "dog"
    assert prompt.input_ids[prompt.placeholder_positions[0]] == add_placeholder(tokenizer)


def test_the_caption_noun_is_found_by_its_span_not_by_its_word(tokenizer) -> None:
    caption = "a dog and a dog"
    prompt = build_prompt(tokenizer, caption, ["dog", "dog"], spans=[(12, 15), (2, 5)])
    assert prompt.caption_noun_positions == ((5,), (2,))


def test_an_unknown_span_gives_no_caption_positions(tokenizer) -> None:
    prompt = build_prompt(tokenizer, "a dog and a mug", ["dog", "mug"], spans=[None, (12, 15)])
    assert prompt.caption_noun_positions == ((), (5,))


def test_ids_are_padded_to_the_models_length(tokenizer) -> None:
    prompt = build_prompt(tokenizer, "a dog", ["dog"])
    assert prompt.input_ids.shape == prompt.plain_input_ids.shape == (32,)
    assert prompt.input_ids[0] == tokenizer.bos_token_id
    assert (prompt.input_ids[prompt.placeholder_positions[0] + 1 :] == tokenizer.pad_token_id).all()
    assert prompt.plain_input_ids.tolist()[:5] == tokenizer("a dog").input_ids + [tokenizer.pad_token_id]


def test_another_padding_token_is_kept(tokenizer) -> None:
    tokenizer.pad_token = "!"  # as SD 2.1 does
    assert build_prompt(tokenizer, "a dog!", ["dog"]).input_ids[-1] == tokenizer.convert_tokens_to_ids("!")


# --- length

LONG = "a dog on the beach next to a red mug in the snow and the grass on a wooden table and a book and an apple"


def test_a_prompt_too_long_is_refused_with_both_numbers(tokenizer) -> None:
    used = len(tokenizer(LONG + ", the dog is <subject>").input_ids)
    with pytest.raises(PromptError, match=f"{used} tokens used, 32 allowed"):
        build_prompt(tokenizer, LONG, ["dog"])


def test_a_prompt_that_fills_every_token_is_accepted_and_one_more_is_refused(tokenizer) -> None:
    # start and end, ", the dog is <subject>" (5 tokens and the placeholder), then one token a word
    words = " ".join(["dog"] * (32 - len(tokenizer(", the dog is <subject>").input_ids)))
    assert build_prompt(tokenizer, words, ["dog"]).input_ids[-1] == tokenizer.eos_token_id
    with pytest.raises(PromptError, match="33 tokens used, 32 allowed"):
        build_prompt(tokenizer, words + " dog", ["dog"])


def test_shortening_drops_as_few_words_as_needed_from_the_end(tokenizer) -> None:
    prompt = build_prompt(tokenizer, LONG, ["dog"], shorten=True)
    caption = prompt.text.removesuffix(", the dog is <subject>")
    assert LONG.startswith(caption)
    next_word = LONG[len(caption) :].split()[0]
    with pytest.raises(PromptError):
        build_prompt(tokenizer, f"{caption} {next_word}", ["dog"])


def test_shortening_keeps_the_spans_that_stay_and_loses_those_cut_off(tokenizer) -> None:
    spaced = LONG.replace("a dog", "a   dog")
    last_word = (len(spaced) - len("apple"), len(spaced))
    prompt = build_prompt(tokenizer, spaced, ["dog", "apple"], spans=[(4, 7), last_word], shorten=True)
    assert text_at(tokenizer, prompt, prompt.caption_noun_positions[0]) == "dog"
    assert prompt.caption_noun_positions[1] == ()


def test_the_plain_caption_is_shortened_by_its_own_length(tokenizer) -> None:
    caption = " ".join(["dog"] * 30)
    prompt = build_prompt(tokenizer, caption, ["dog"], shorten=True)
    assert torch.equal(prompt.plain_input_ids, encode_ids(tokenizer, caption))


def test_nouns_that_alone_are_too_long_are_refused_even_when_shortening(tokenizer) -> None:
    with pytest.raises(PromptError, match="the nouns .* alone use"):
        build_prompt(tokenizer, "a dog", ["dog"] * 8, shorten=True)


def test_a_very_long_caption_is_shortened_quickly(tokenizer) -> None:
    assert build_prompt(tokenizer, "dog " * 20_000, ["dog"], shorten=True).input_ids.shape == (32,)


# --- what is refused


@pytest.mark.parametrize(
    ("caption", "noun"),
    [("a <subject>", "dog"), ("a dog", "<subject>"), ("a <SUBJECT>", "dog"), ("a dog<|endoftext|>", "dog")],
)
def test_reserved_tokens_are_refused_in_caption_and_noun(tokenizer, caption, noun) -> None:
    with pytest.raises(PromptError, match="reserved token"):
        build_prompt(tokenizer, caption, [noun])


def test_the_negative_prompt_may_not_hold_the_placeholder(tokenizer) -> None:
    with pytest.raises(PromptError, match="reserved token <subject>"):
        encode_ids(tokenizer, f"no {PLACEHOLDER}")


@pytest.mark.parametrize("noun", ["", "  "])
def test_an_empty_noun_is_refused(tokenizer, noun) -> None:
    with pytest.raises(PromptError, match="is empty"):
        build_prompt(tokenizer, "a dog", [noun])


@pytest.mark.parametrize("span", [(2, 9), (3, 3), (-1, 2)])
def test_a_span_outside_the_caption_is_refused(tokenizer, span) -> None:
    with pytest.raises(PromptError, match="outside the caption"):
        build_prompt(tokenizer, "a dog", ["dog"], spans=[span])


def test_a_tokenizer_without_placeholder_is_refused() -> None:
    with pytest.raises(ValueError, match="call add_placeholder first"):
        build_prompt(tiny_tokenizer(placeholder=False), "a dog", ["dog"])


# --- supervised tokens


@pytest.fixture
def prompts(tokenizer):
    return [
        build_prompt(tokenizer, "a teddy bear and a mug", ["teddy bear", "mug"], spans=[(2, 12), None]),
        build_prompt(tokenizer, "a dog", ["dog"]),
    ]


def test_the_placeholder_alone_has_all_the_weight(prompts) -> None:
    weights = weights_of(prompts, 3, ["placeholder"])
    assert weights.shape == (2, 3, 32)
    assert weights[0, 1, prompts[0].placeholder_positions[1]] == 1
    assert weights.sum().item() == 3


def test_weight_is_shared_among_placeholder_noun_and_caption_noun(prompts) -> None:
    weights = weights_of(prompts, 2, ["placeholder", "noun", "caption"])
    prompt = prompts[0]
    supervised = {prompt.placeholder_positions[0], *prompt.noun_positions[0], *prompt.caption_noun_positions[0]}
    assert len(prompt.noun_positions[0]) > 1
    assert set(weights[0, 0].nonzero().flatten().tolist()) == supervised
    assert torch.allclose(weights[0, 0][sorted(supervised)], torch.tensor(1 / len(supervised)))


def test_rows_sum_to_one_and_padding_subjects_to_zero(prompts) -> None:
    sums = weights_of(prompts, 3, ["noun"]).sum(-1)
    assert torch.allclose(sums, torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))


def test_a_subject_without_caption_span_has_no_weight_on_the_caption_alone(prompts) -> None:
    assert torch.allclose(weights_of(prompts, 2, ["caption"]).sum(-1), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


def test_an_unknown_kind_of_supervision_is_refused(prompts) -> None:
    with pytest.raises(ValueError, match="expected a list of"):
        weights_of(prompts, 2, ["verb"])
