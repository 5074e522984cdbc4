"""model/text_fusion.py: the text encoder with concepts in place of placeholders."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from model.text_fusion import encode_prompt

VOCABULARY, LENGTH, WIDTH = 50, 12, 32
PLACEHOLDER_ID = VOCABULARY


@pytest.fixture(params=["sdpa", "eager"])
def text_encoder(request) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=LENGTH, bos_token_id=VOCABULARY - 2, eos_token_id=VOCABULARY - 1,
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    model.set_attn_implementation(request.param)
    for parameter in model.parameters():  # stock initialisation is so small that changes would hide in rounding
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def plain_ids() -> torch.Tensor:
    ids = torch.randint(0, VOCABULARY - 2, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, 8:] = VOCABULARY - 2, VOCABULARY - 1
    return ids


@pytest.fixture
def positions() -> torch.Tensor:
    return torch.tensor([[3, 5], [4, -1]])


@pytest.fixture
def ids(plain_ids, positions) -> torch.Tensor:
    ids = plain_ids.clone()
    ids[0, 3] = ids[0, 5] = ids[1, 4] = PLACEHOLDER_ID
    return ids


@pytest.fixture
def concepts() -> torch.Tensor:
    return torch.randn(2, 2, WIDTH, generator=torch.Generator().manual_seed(2))


def test_without_concepts_it_equals_the_stock_encoder(text_encoder, plain_ids) -> None:
    none = torch.full((2, 2), -1)
    stock = text_encoder(plain_ids).last_hidden_state
    assert torch.equal(encode_prompt(text_encoder, plain_ids, None, none), stock)
    assert torch.equal(encode_prompt(text_encoder, plain_ids, torch.zeros(2, 2, WIDTH), none), stock)


def test_a_words_own_embedding_as_concept_equals_the_word(text_encoder, plain_ids, ids, positions) -> None:
    words = plain_ids.gather(1, positions.clamp_min(0))
    concepts = text_encoder.embeddings.token_embedding(words)
    stock = text_encoder(plain_ids).last_hidden_state
    assert torch.allclose(encode_prompt(text_encoder, ids, concepts, positions), stock, atol=1e-6)


def test_each_subject_goes_to_its_own_position(text_encoder, ids, positions, concepts) -> None:
    swapped = encode_prompt(text_encoder, ids, concepts.flip(1), positions.flip(1))
    assert torch.equal(swapped, encode_prompt(text_encoder, ids, concepts, positions))


@pytest.mark.parametrize("fusion", ["before", "after"])
def test_padding_subjects_do_not_reach_the_output(text_encoder, ids, positions, concepts, fusion) -> None:
    other = concepts.clone()
    other[1, 1] = 1e6
    first = encode_prompt(text_encoder, ids, concepts, positions, fusion)
    assert torch.equal(first, encode_prompt(text_encoder, ids, other, positions, fusion))


def test_before_is_causal_nothing_ahead_of_the_placeholder_changes(text_encoder, ids, positions, concepts) -> None:
    first = encode_prompt(text_encoder, ids, concepts, positions)
    second = encode_prompt(text_encoder, ids, 2 * concepts, positions)
    assert torch.equal(first[0, :3], second[0, :3])
    assert (first[0, 3:] - second[0, 3:]).abs().amax(-1).min() > 1e-3, "all later states hear of the subject"


def test_after_replaces_the_state_itself_scaled_and_nothing_else(text_encoder, ids, positions, concepts) -> None:
    states = encode_prompt(text_encoder, ids, concepts, positions, "after", scale=0.4)
    torch.testing.assert_close(states[0, 3], 0.4 * concepts[0, 0])
    torch.testing.assert_close(states[0, 5], 0.4 * concepts[0, 1])
    torch.testing.assert_close(states[1, 4], 0.4 * concepts[1, 0])
    other = encode_prompt(text_encoder, ids, concepts + 1, positions, "after", scale=0.4)
    untouched = ids != PLACEHOLDER_ID
    assert torch.equal(states[untouched], other[untouched])


def test_after_reads_the_end_token_where_the_placeholder_stands(text_encoder, ids, positions, concepts) -> None:
    states = encode_prompt(text_encoder, ids, concepts, positions, "after")
    stock = text_encoder(ids.masked_fill(ids == PLACEHOLDER_ID, VOCABULARY - 1)).last_hidden_state
    untouched = ids != PLACEHOLDER_ID
    torch.testing.assert_close(states[untouched], stock[untouched])


def test_before_scales_the_concept_too(text_encoder, ids, positions, concepts) -> None:
    scaled = encode_prompt(text_encoder, ids, concepts, positions, "before", scale=0.5)
    assert torch.equal(scaled, encode_prompt(text_encoder, ids, 0.5 * concepts, positions))


def test_no_subject_slots_at_all_is_a_plain_prompt(text_encoder, plain_ids) -> None:
    empty = torch.zeros(2, 0, WIDTH), torch.zeros(2, 0, dtype=torch.int64)
    assert torch.equal(encode_prompt(text_encoder, plain_ids, *empty), text_encoder(plain_ids).last_hidden_state)


@pytest.mark.parametrize("fusion", ["before", "after"])
def test_checkpointing_gives_the_same_gradients(text_encoder, ids, positions, concepts, fusion) -> None:
    def gradients() -> list[torch.Tensor]:
        text_encoder.zero_grad()
        leaf = concepts.clone().requires_grad_()
        encode_prompt(text_encoder, ids, leaf, positions, fusion).square().sum().backward()
        return [leaf.grad, *(parameter.grad for parameter in text_encoder.parameters())]

    text_encoder.train()
    without = gradients()
    text_encoder.activation_checkpointing_enable()
    for first, second in zip(without, gradients(), strict=True):
        assert first.abs().max() > 0
        torch.testing.assert_close(first, second)


def test_bf16_weights_take_fp32_concepts(text_encoder, ids, positions, concepts) -> None:
    full = encode_prompt(text_encoder, ids, concepts, positions)
    half = encode_prompt(text_encoder.bfloat16(), ids, concepts, positions)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().mean() < 0.05


def test_autocast_works(text_encoder, ids, positions, concepts) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        states = encode_prompt(text_encoder, ids, concepts, positions)
    assert (states.float() - encode_prompt(text_encoder, ids, concepts, positions)).abs().mean() < 0.05


def test_an_unknown_fusion_is_refused(text_encoder, ids, positions, concepts) -> None:
    with pytest.raises(ValueError, match="fusion 'middle'"):
        encode_prompt(text_encoder, ids, concepts, positions, "middle")
