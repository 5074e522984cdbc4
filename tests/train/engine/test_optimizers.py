"""AdamW in named groups of parameters, each with a factor on the learning rate that the schedule keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from data_pipeline.errors import UserError
from train.engine.optimizers import build_optimizer
from train.engine.schedule import learning_rate_factor
from train.settings import OptimizerSettings


def small() -> nn.Module:
    """adapter.0.weight, adapter.0.bias, text.weight, text.bias trained; frozen.weight, frozen.bias not."""
    module = nn.ModuleDict(
        {"adapter": nn.Sequential(nn.Linear(2, 2)), "text": nn.Linear(2, 2), "frozen": nn.Linear(2, 2)}
    )
    module["frozen"].requires_grad_(False)
    return module


def names_of(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, list[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {group["name"]: [names[id(p)] for p in group["params"]] for group in optimizer.param_groups}


def settings(**changes: object) -> OptimizerSettings:
    return OptimizerSettings.model_validate({"learning_rate": 1e-3, **changes})


def test_each_trained_parameter_is_in_the_first_group_whose_pattern_matches_its_whole_name() -> None:
    module = small()
    optimizer = build_optimizer(module, settings(groups={r"adapter\..*\.weight": 0.01, r"adapter\..*": 0.1}))
    assert names_of(optimizer, module) == {
        r"adapter\..*\.weight": ["adapter.0.weight"],
        r"adapter\..*": ["adapter.0.bias"],
        "rest": ["text.weight", "text.bias"],
    }
    assert [group["initial_lr"] for group in optimizer.param_groups] == pytest.approx([1e-5, 1e-4, 1e-3])


def test_without_patterns_all_is_one_group_and_with_patterns_for_all_there_is_no_rest() -> None:
    assert [group["name"] for group in build_optimizer(small(), settings()).param_groups] == ["rest"]
    assert [group["name"] for group in build_optimizer(small(), settings(groups={".*": 2})).param_groups] == [".*"]


def test_one_step_is_adamw_with_each_groups_rate() -> None:
    module = small()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    chosen = settings(groups={r"text\..*": 0.1}, weight_decay=0.1, beta1=0.8, beta2=0.9, epsilon=1e-12)
    optimizer = build_optimizer(module, chosen)
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, 3.0) if parameter.requires_grad else None
    optimizer.step()
    # Adam's first step is the rate in the gradient's direction; decoupled decay takes rate x 0.1 of the weight.
    for name, rate in (("adapter.0.weight", 1e-3), ("text.bias", 1e-4), ("frozen.weight", 0.0)):
        expected = before[name] * (1 - 0.1 * rate) - rate
        torch.testing.assert_close(module.get_parameter(name), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"groups": {r"adaptor\..*": 1}},
            r"optimizer.groups: adaptor\\\.\.\*: no trained parameter .* like it: adapter",
        ),
        ({"groups": {r"frozen\..*": 1}}, "no trained parameter has such a name"),
        ({"groups": {"text": 1}}, "no trained parameter has such a name; names like it: text.bias"),
        ({"groups": {".*": 1, r"text\..*": 1}}, "an earlier pattern takes all of its parameters; none is left"),
        ({"groups": {"(": 1}}, "is no regular expression"),
        ({"groups": {".*": 0}}, "above 0"),
    ],
)
def test_a_group_that_cannot_be_is_refused_in_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        build_optimizer(small(), settings(**changes))
    assert "\n" not in str(raised.value)


def test_a_module_without_trained_parameters_is_refused() -> None:
    with pytest.raises(UserError, match="trained: no parameter takes gradients"):
        build_optimizer(small().requires_grad_(False), settings())


def test_8_bit_adam_wants_bitsandbytes_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.engine.optimizers.find_spec", lambda name: None)
    with pytest.raises(UserError, match="optimizer.kind=adamw8bit: needs bitsandbytes.*pip install bitsandbytes"):
        build_optimizer(small(), settings(kind="adamw8bit"))
    monkeypatch.setattr("train.engine.optimizers.find_spec", lambda name: object())
    with pytest.raises(UserError, match="optimizer.kind=adamw8bit: runs on an NVIDIA GPU only"):
        build_optimizer(small(), settings(kind="adamw8bit"))


@pytest.mark.gpu
def test_on_a_gpu_the_optimiser_is_fused_and_8_bit_states_are_bytes() -> None:
    module = small().cuda()
    assert build_optimizer(module, settings()).param_groups[0]["fused"]
    pytest.importorskip("bitsandbytes")
    large = nn.Linear(256, 256).cuda()  # below 4096 numbers bitsandbytes keeps 32 bits
    optimizer = build_optimizer(large, settings(kind="adamw8bit"))
    large(torch.ones(1, 256, device="cuda")).sum().backward()
    optimizer.step()
    assert optimizer.state[large.weight]["state1"].dtype == torch.uint8


def test_the_rate_warms_up_and_decays_as_asked() -> None:
    for decay, middle, last in (("constant", 1.0, 1.0), ("linear", 0.5, 0.01), ("cosine", 0.5, 0.0)):
        factors = [learning_rate_factor(step, 110, settings(warmup_steps=10, decay=decay)) for step in range(110)]
        assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
        assert factors[60] == pytest.approx(middle) and factors[109] == pytest.approx(last, abs=1e-3)


@pytest.mark.parametrize(("decay", "middle"), [("linear", 0.6), ("cosine", 0.6), ("constant", 1.0)])
def test_a_decay_may_end_above_zero(decay: str, middle: float) -> None:
    told = settings(warmup_steps=10, decay=decay, decay_to=0.2)
    factors = [learning_rate_factor(step, 110, told) for step in range(111)]
    assert factors[4] == pytest.approx(0.5) and factors[10] == 1.0 and factors[60] == pytest.approx(middle)
    assert factors[110] == pytest.approx(1.0 if decay == "constant" else 0.2)
