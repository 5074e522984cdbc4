"""model/lasr/: embeddings, pooling, init words, losses, each against its definition on small tensors."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from model.lasr.adaptive_embedding import AdaptiveEmbedding
from model.lasr.composition_delta import composition_delta_loss
from model.lasr.init_words import init_vectors
from model.lasr.layerwise_basis import LayerwiseBasis, basis_rank
from model.lasr.pooling import AttentionPool, average_pool, token_weights
from model.lasr.regulariser import basis_penalty, lasr_regulariser
from model.lasr.static_embedding import StaticEmbedding
from model.prompt import PromptError
from tests.model.tiny import tiny_text_encoder
from tests.model.tiny_tokenizer import tiny_tokenizer

WIDTH, LAYERS = 4, 3
INIT = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0]])
NEGATIVE = torch.tensor([[0, 0, 3.0, 0]])


def basis(vectors: int = 1, negative: torch.Tensor = NEGATIVE) -> LayerwiseBasis:
    torch.manual_seed(0)
    return LayerwiseBasis(INIT, negative, basis_rank(2, 2, len(negative)), LAYERS, vectors)


def fill(parameter: nn.Parameter, values: list | float) -> None:
    with torch.no_grad():
        parameter.copy_(torch.tensor(values).expand_as(parameter))


# --- basis and static embedding


@pytest.mark.parametrize(
    ("ratio", "init", "negative", "rank"), [(2, 3, 0, 7), (2, 2, 1, 6), (1.4, 3, 0, 5), (2, 0, 0, 2)]
)
def test_rank(ratio, init, negative, rank) -> None:
    assert basis_rank(ratio, init, negative) == rank


def test_a_ratio_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="rank ratio 0.5: must be at least 1"):
        basis_rank(0.5, 2, 0)


def test_the_basis_starts_with_init_words_minus_negative_words_small_random_ones_and_zero() -> None:
    made = basis(vectors=2)
    assert made.rank == 6 and made.extra_vectors.shape == (2, 4, WIDTH)
    assert torch.equal(made.init_vectors[1], INIT)
    assert torch.equal(made.extra_vectors[:, 0], -NEGATIVE.expand(2, -1))
    torch.testing.assert_close(made.extra_vectors[:, 1:3].norm(dim=-1), torch.full((2, 2), 0.25))
    assert made.extra_vectors[:, 3].abs().max() == 0
    assert not torch.equal(made.extra_vectors[0, 1], made.extra_vectors[1, 1]), "each vector has a basis of its own"


def test_a_row_by_hand() -> None:
    made = basis(negative=torch.zeros(0, WIDTH))
    coefficients = torch.zeros(LAYERS, 1, made.rank)
    coefficients[1, 0, :2] = torch.tensor([3.0, 0.5])  # 3 e1 + 0.5 (2 e2) = (3, 1, 0, 0): mean 1, variance 1.5
    fill(made.norm_weight, [[1.0], [2.0], [1.0]])
    fill(made.norm_bias, 0.25)
    fill(made.bias, 0.1)
    fill(made.bias_scale, [[[1.0]], [[3.0]], [[1.0]]])
    normed = torch.tensor([2.0, 0.0, -1.0, -1.0]) / math.sqrt(1.5 + 1e-5)
    expected = (2 * normed + 0.25) / math.sqrt(4) + 3 * 0.1
    torch.testing.assert_close(made(coefficients)[1, 0], expected)
    torch.testing.assert_close(made.of_all_layers().rows_of(1, coefficients[1]), made(coefficients)[1])


def test_coefficients_start_at_the_normalised_weights_with_small_noise() -> None:
    torch.manual_seed(0)
    many = LayerwiseBasis(INIT, NEGATIVE, 6, num_layers=2000, num_vectors=1)
    static = StaticEmbedding(many, torch.tensor([1.0, 3.0]))
    torch.testing.assert_close(static.common_coefficients[0], torch.tensor([0.25, 0.75, 0.2, 0.2, 0.2, 0.2]))
    spread = static.layer_coefficients[:, 0].std(dim=0)
    torch.testing.assert_close(spread, torch.tensor([0.02] * 2 + [0.1] * 4), rtol=0.1, atol=0)
    torch.testing.assert_close(static(), many(static.layer_coefficients + static.common_coefficients))
    with pytest.raises(ValueError, match="1 for 2 init vectors"):
        StaticEmbedding(many, torch.ones(1))


def test_without_init_words_coefficients_are_alike_on_average() -> None:
    made = LayerwiseBasis(torch.zeros(0, WIDTH), torch.zeros(0, WIDTH), basis_rank(2, 0, 0), LAYERS, 2)
    static = StaticEmbedding(made, torch.zeros(0))
    assert torch.equal(static.common_coefficients, torch.full((2, 2), 0.5))
    assert static().shape == (LAYERS, 2, WIDTH) and static().isfinite().all()


# --- init words


def test_init_words_are_the_embeddings_of_their_tokens_with_normalised_weights() -> None:
    tokenizer, table = tiny_tokenizer(), tiny_text_encoder().embeddings.token_embedding
    found = init_vectors(tokenizer, table, ["dog", "red"], [1, 3])
    ids = tokenizer.convert_tokens_to_ids(["dog</w>", "red</w>"])
    assert torch.equal(found.vectors, table.weight[ids])
    torch.testing.assert_close(found.weights, torch.tensor([0.25, 0.75]))
    assert len(init_vectors(tokenizer, table, []).vectors) == 0


@pytest.mark.parametrize(
    ("words", "weights", "message"),
    [
        (["xqzv"], None, "init word 'xqzv': is unknown to this base's tokenizer"),
        (["teddy bear"], None, "is unknown|single common words"),
        ([""], None, "init word ''"),
        (["dog"], [1, 2], "2 for 1 words"),
        (["dog"], [0], "must all be above 0"),
    ],
)
def test_words_that_say_nothing_are_refused_in_one_line(words, weights, message) -> None:
    with pytest.raises(PromptError, match=message) as error:
        init_vectors(tiny_tokenizer(), tiny_text_encoder().embeddings.token_embedding, words, weights)
    assert "\n" not in str(error.value)


# --- adaptive embedding


def test_an_adaptive_row_by_its_definition() -> None:
    adaptive = AdaptiveEmbedding(basis(vectors=2), widths=[6, 8, 10], time_width=5)
    features, time = torch.randn(2, 9, 8), torch.randn(2, 5)
    pooled = adaptive.pool(1, features, None, torch.zeros(2, WIDTH), attention=None)
    torch.testing.assert_close(pooled, features.mean(dim=1))
    for parameter in (*adaptive.feature_norms[1].parameters(), *adaptive.time_norms[1].parameters()):
        nn.init.normal_(parameter)
    z = torch.cat([adaptive.feature_norms[1](pooled), adaptive.time_norms[1](time[:, :4])], dim=1)  # half of 8 channels
    coefficients = (z @ adaptive.maps[1].weight.T + adaptive.maps[1].bias).view(2, 2, -1)
    torch.testing.assert_close(adaptive(1, pooled, time), adaptive.basis.of_all_layers().rows_of(1, coefficients))
    assert adaptive.time_norms[2].normalized_shape == (5,), "no more than the time embedding has"


def test_masked_average_pooling_by_hand() -> None:
    valid = torch.ones(1, 1, 4, 4)
    valid[..., 1:] = 0  # one of four columns: half of the left cells of a 2 x 2 grid
    weights = token_weights(valid, 4)
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.0, 0.5, 0.0]]))
    features = torch.tensor([[[1.0], [100.0], [3.0], [100.0]]])
    torch.testing.assert_close(average_pool(features, weights), torch.tensor([[2.0]]))


def test_attention_pooling_by_its_definition() -> None:
    torch.manual_seed(0)
    layer = Attention(query_dim=16, cross_attention_dim=WIDTH, heads=2, dim_head=8)
    pool = AttentionPool(width=16, inner=16)
    features, rows = torch.randn(1, 5, 16), torch.randn(2, WIDTH)
    weights = torch.tensor([[1.0, 1, 1, 0, 0]])
    query, key = layer.to_k(rows.mean(0)), layer.to_q(features[0, :3])
    values = nn.functional.layer_norm(features[0, :3], (16,))
    looked = []
    for head in range(8):
        own = slice(2 * head, 2 * head + 2)
        logits = (key[:, own] @ pool.key[head]) @ (query[own] @ pool.query[head]) / math.sqrt(8)
        looked.append(logits.softmax(0) @ values[:, own])
    foreground = torch.cat(looked)
    background = values.mean(0) - foreground
    expected = torch.cat([nn.functional.layer_norm(part, (16,)) for part in (foreground, background)])
    torch.testing.assert_close(pool(features, weights, rows, layer)[0], expected, atol=1e-4, rtol=1e-3)
    with pytest.raises(ValueError, match="needs multiples of 8"):
        AttentionPool(width=12, inner=16)


def test_features_take_no_gradient() -> None:
    adaptive = AdaptiveEmbedding(basis(), widths=[8, 8, 8], time_width=4)
    features = torch.randn(1, 4, 8, requires_grad=True)
    time = torch.randn(1, 4, requires_grad=True)
    adaptive(0, adaptive.pool(0, features, None, torch.zeros(1, WIDTH), attention=None), time).sum().backward()
    assert features.grad is None and time.grad is None and adaptive.maps[0].weight.grad is not None


# --- losses


def test_the_delta_loss_by_hand() -> None:
    zero = torch.zeros(1, 1, 1, 2)
    change = torch.tensor([2.0, 1.0]).view(1, 1, 1, 2)  # third power: (8, 1)
    subject = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    torch.testing.assert_close(
        composition_delta_loss(zero, subject, zero, change), torch.tensor(1 - 8 / math.sqrt(65)), atol=1e-6, rtol=0
    )
    cubed = (change**3).expand(1, 7, 1, 2)  # the class prompts are alike in all layers
    assert composition_delta_loss(zero, cubed, zero, change) < 1e-6
    assert composition_delta_loss(zero, -cubed, zero, change) > 2 - 1e-6


def test_tokens_before_the_phrase_count_as_one_and_give_no_gradient() -> None:
    single = torch.randn(1, 2, 3, 4, requires_grad=True)
    composed = single.detach().clone()
    composed[:, :, 2] += 1
    loss = composition_delta_loss(single, composed, torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))
    assert loss == 1
    loss.backward()
    assert single.grad.abs().max() == 0


def test_only_the_subjects_prompts_take_gradients_and_small_changes_count_as_large_ones() -> None:
    prompts = [torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(4)]
    loss = composition_delta_loss(*prompts)
    loss.backward()
    assert prompts[0].grad.isfinite().all() and prompts[1].grad.abs().max() > 0
    assert prompts[2].grad is None and prompts[3].grad is None
    small = composition_delta_loss(*(prompt.detach() * 1e-5 for prompt in prompts))
    torch.testing.assert_close(small, loss.detach(), atol=1e-3, rtol=0)


def test_the_regulariser_by_hand() -> None:
    made = basis(negative=torch.zeros(0, WIDTH))
    fill(made.bias, 0.5)  # norm 1: weight 0.1, mean square 0.25
    fill(made.bias_scale, [[[2.0]], [[1.0]], [[0.5]]])  # 4 above 1; (1 + 0.25) / 2 up to 1
    fill(made.extra_vectors, [2.0, 0, 0, 0])  # norm 2, mean square 1
    fill(made.init_vectors, (INIT + 0.1).tolist())
    expected = 0.1 * 0.25 + (4 + 1e-4 * 0.625) / WIDTH + 0.1 * 2**1.5 * 1 + 0.1 * 0.01
    torch.testing.assert_close(basis_penalty(made), torch.tensor(expected))
    static = StaticEmbedding(made, torch.ones(2))
    torch.testing.assert_close(lasr_regulariser(static), torch.tensor(5 * expected))
    adaptive = AdaptiveEmbedding(basis(), widths=[8, 8, 8], time_width=4)
    for linear in adaptive.maps:
        fill(linear.weight, 0.1)
        fill(linear.bias, 2.0)
    maps = 3 * (0.01 + 0.01 * 4)
    both = 5 * torch.tensor(expected) + 10 * (basis_penalty(adaptive.basis) + maps)
    torch.testing.assert_close(lasr_regulariser(static, adaptive), both)
