"""model/subject_adapter/fuser.py: diffusers' gated self-attention, with masks, factors, caching and row selection."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.models.attention import GatedSelfAttentionDense

from model.subject_adapter import SubjectCondition
from model.subject_adapter.fuser import SubjectFuser
from tests.model.tiny import wake

ROWS, IMAGE, SUBJECT = 3, 16, 5  # rows, image tokens (4 x 4), subject tokens


@pytest.fixture
def stock() -> GatedSelfAttentionDense:
    torch.manual_seed(0)
    layer = GatedSelfAttentionDense(query_dim=16, context_dim=24, n_heads=2, d_head=8)
    wake(layer)
    return layer


@pytest.fixture
def fuser(stock: GatedSelfAttentionDense) -> SubjectFuser:
    ours = SubjectFuser("block", 16, 24, 2, 8)
    ours.load_state_dict(stock.state_dict())
    return ours


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(ROWS, IMAGE, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def condition() -> SubjectCondition:
    tokens = torch.randn(ROWS, SUBJECT, 24, generator=torch.Generator().manual_seed(2))
    return SubjectCondition(tokens, None, torch.ones(ROWS), torch.zeros(ROWS, 1, 4, 4))


def keep_first(count: int) -> torch.Tensor:
    return (torch.arange(SUBJECT) < count).expand(ROWS, -1)


def test_it_is_the_identity_before_training(image, condition):
    assert torch.equal(SubjectFuser("block", 16, 24, 2, 8)(image, condition), image)


def test_zero_outputs_let_it_learn_from_the_first_step_where_zero_gates_hold_the_rest_back(image, condition):
    reached = {}
    for zero_outputs in (False, True):
        fuser = SubjectFuser("block", 16, 24, 2, 8)
        if zero_outputs:
            fuser.start_with_zero_outputs()
            assert torch.equal(fuser(image, condition), image)
        (fuser(image, condition) * torch.randn(image.shape)).sum().backward()
        reached[zero_outputs] = {name for name, p in fuser.named_parameters() if p.grad.abs().max() > 0}
    assert reached[False] == {"alpha_attn", "alpha_dense"}
    assert {"attn.to_out.0.weight", "ff.net.2.weight"} <= reached[True]


def test_outputs_and_gradients_are_those_of_the_stock_layer(stock, fuser, image, condition):
    ours, theirs = fuser(image, condition), stock(image, condition.tokens)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    expected = dict(stock.named_parameters())
    for name, parameter in fuser.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad.reshape(parameter.shape), atol=1e-4, rtol=1e-5)


def test_the_state_dict_is_that_of_the_stock_layer_in_both_directions(stock, fuser):
    ours, theirs = fuser.state_dict(), stock.state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}
    stock.load_state_dict(ours)


def test_gates_have_one_dimension_in_memory(fuser):
    assert fuser.alpha_attn.shape == fuser.alpha_dense.shape == (1,)


def test_gates_saved_with_one_dimension_load_too(fuser):
    state = fuser.state_dict() | {"alpha_attn": torch.tensor([0.25])}
    fuser.load_state_dict(state)
    assert fuser.alpha_attn.item() == 0.25


def test_its_attention_is_not_taken_for_a_layer_with_a_processor(fuser):
    assert not any(hasattr(module, "set_processor") or hasattr(module, "get_processor") for module in fuser.modules())


def test_cached_keys_and_values_change_nothing(fuser, image, condition):
    cached = replace(condition, key_values={"block": fuser.keys_values(condition.tokens)}, tokens=condition.tokens * 0)
    assert torch.equal(fuser(image, cached), fuser(image, condition))


def test_padding_equals_leaving_the_tokens_out(fuser, image, condition):
    padded = replace(condition, tokens=condition.tokens * keep_first(3)[..., None], keep=keep_first(3))
    without = replace(condition, tokens=condition.tokens[:, :3])
    torch.testing.assert_close(fuser(image, padded), fuser(image, without), atol=1e-6, rtol=0)


def test_a_row_of_factor_0_is_returned_exactly(fuser, image, condition):
    mixed = fuser(image, replace(condition, factor=torch.tensor([1.0, 0.0, 1.0])))
    assert torch.equal(mixed[1], image[1])
    assert torch.equal(mixed[0], fuser(image, condition)[0])


def test_a_row_whose_subjects_are_all_masked_is_finite_and_with_factor_0_exact(fuser, image, condition):
    nothing = replace(condition, keep=keep_first(0))
    assert fuser(image, nothing).isfinite().all()
    assert torch.equal(fuser(image, replace(nothing, factor=torch.zeros(ROWS))), image)


def test_gradients_through_masked_rows_are_finite(fuser, image, condition):
    fuser(image, replace(condition, keep=keep_first(0), factor=torch.tensor([1.0, 0.0, 1.0]))).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in fuser.parameters())


def test_beta_scales_both_residuals(fuser, image, condition):
    assert torch.equal(fuser(image, replace(condition, beta=0.0)), image)
    with torch.no_grad():
        fuser.alpha_dense.zero_()  # then the output is linear in beta
    half, full = fuser(image, replace(condition, beta=0.5)), fuser(image, condition)
    torch.testing.assert_close(half - image, (full - image) / 2, atol=1e-6, rtol=1e-5)


def test_strength_w_of_a_token_weighs_as_w_copies_of_it(fuser, image, condition):
    doubled = replace(condition, tokens=torch.cat([condition.tokens, condition.tokens], dim=1))
    twice = replace(condition, log_strength=torch.full((ROWS, SUBJECT), 2.0).log())
    torch.testing.assert_close(fuser(image, twice), fuser(image, doubled), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("keep", [None, keep_first(3)])
def test_computing_the_active_rows_only_changes_nothing(fuser, image, condition, keep):
    factor, rows = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0, 2])
    everything = replace(condition, factor=factor, keep=keep)
    torch.testing.assert_close(
        fuser(image, replace(everything, active_rows=rows)), fuser(image, everything), atol=1e-6, rtol=0
    )


def test_caches_hold_the_active_rows(fuser, image, condition):
    rows = torch.tensor([2])
    some = replace(condition, factor=torch.tensor([0.0, 0.0, 1.0]), active_rows=rows)
    cached = replace(some, key_values={"block": fuser.keys_values(condition.tokens[rows])})
    assert torch.equal(fuser(image, cached), fuser(image, some))


def test_no_active_row_costs_nothing(fuser, image, condition):
    assert fuser(image, replace(condition, active_rows=torch.zeros(0, dtype=torch.int64))) is image


def test_tokens_with_a_box_are_seen_inside_it_only(fuser, image, condition):
    left_half = torch.tensor([0.0, 0.0, 0.5, 1.0]).expand(ROWS, SUBJECT, 4)
    boxed = fuser(image, replace(condition, token_boxes=left_half)).unflatten(1, (4, 4))
    seen = fuser(image, condition).unflatten(1, (4, 4))
    unseen = fuser(image, replace(condition, keep=keep_first(0))).unflatten(1, (4, 4))
    torch.testing.assert_close(boxed[:, :, :2], seen[:, :, :2], atol=1e-6, rtol=0)
    torch.testing.assert_close(boxed[:, :, 2:], unseen[:, :, 2:], atol=1e-6, rtol=0)


def test_it_runs_in_bfloat16(fuser, image, condition):
    low = replace(
        condition,
        tokens=condition.tokens.bfloat16(),
        keep=keep_first(3),
        log_strength=torch.zeros(ROWS, SUBJECT),
    )
    assert fuser.bfloat16()(image.bfloat16(), low).dtype == torch.bfloat16
