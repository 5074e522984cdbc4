"""train/engine/averaging.py: the running average of the weights. Averages are worked out by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from train.engine.averaging import AveragedWeights
from train.settings import EmaSettings


class OneNumber(nn.Module):
    """A trained weight, and a frozen one that no average holds."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.tensor([value]))
        self.frozen = nn.Parameter(torch.tensor([7.0]), requires_grad=False)

    def forward(self) -> Tensor:
        return self.trained * self.frozen


def average_of(values: list[float], settings: EmaSettings) -> float:
    module = OneNumber()
    average = AveragedWeights(module, settings)
    for step, value in enumerate(values):
        nn.init.constant_(module.trained, value)
        average.update(step)
    return average.state_tensors()["trained"].item()


def test_the_first_update_is_a_copy_and_the_decay_grows_to_its_bound() -> None:
    first = average_of([1.0], EmaSettings(decay=0.5))
    second = average_of([1.0, 2.0], EmaSettings(decay=0.5))  # decay 2/11
    third = average_of([1.0, 2.0, 4.0], EmaSettings(decay=0.2))  # decay 2/11, then 0.2 and not 3/12
    assert first == 1.0
    assert second == pytest.approx(1 * 2 / 11 + 2 * 9 / 11)
    assert third == pytest.approx(0.2 * (20 / 11) + 0.8 * 4)


def test_before_its_start_the_average_is_the_weights() -> None:
    settings = EmaSettings(decay=0.5, start=2)
    assert average_of([1.0, 5.0], settings) == 5.0
    assert average_of([1.0, 5.0, 3.0], settings) == 3.0
    assert average_of([1.0, 5.0, 3.0, 4.0], settings) == pytest.approx(3 * 2 / 11 + 4 * 9 / 11)


def test_with_every_second_step_an_update_weighs_the_past_as_two_would() -> None:
    settings = EmaSettings(decay=0.1, every=2)
    assert average_of([1.0], settings) == 1.0
    assert average_of([9.0, 1.0, 9.0], settings) == 1.0
    assert average_of([9.0, 1.0, 9.0, 2.0], settings) == pytest.approx(0.01 * 1 + 0.99 * 2)


def test_with_decay_0_the_average_is_the_weights_themselves() -> None:
    module = OneNumber(3.0)
    average = AveragedWeights(module, EmaSettings(decay=0))
    average.update(0)
    nn.init.constant_(module.trained, 4.0)
    assert average.state_tensors()["trained"].item() == 4.0
    average.load_tensors({"trained": torch.tensor([9.0])})
    with average.averaged():
        assert module.trained.item() == 4.0 and not module.training
    assert module.training


def test_only_trained_parameters_are_averaged_in_float32() -> None:
    state = AveragedWeights(OneNumber(), EmaSettings()).state_tensors()
    assert list(state) == ["trained"] and state["trained"].dtype == torch.float32


def averaged_network() -> tuple[nn.Module, AveragedWeights]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Dropout(), nn.Conv2d(5, 2, 1)).to(memory_format=torch.channels_last)
    average = AveragedWeights(module, EmaSettings(decay=0.9))
    for step in range(3):
        take_step(module)
        average.update(step)
    return module, average


@torch.no_grad()
def take_step(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape))


@pytest.mark.parametrize("fails", [False, True])
def test_inside_the_context_the_module_computes_with_the_average_and_after_it_as_before(fails: bool) -> None:
    module, average = averaged_network()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = average.state_tensors()
    try:
        with average.averaged():
            assert not module.training
            assert all(torch.equal(module.get_parameter(name), value) for name, value in state.items())
            assert not torch.equal(state["0.weight"], before["0.weight"])
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert module.training
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


def test_an_average_that_was_saved_and_loaded_goes_on_as_the_undisturbed_one() -> None:
    module, average = averaged_network()
    again = AveragedWeights(module, EmaSettings(decay=0.9))
    again.load_tensors({name: value.clone() for name, value in average.state_tensors().items()})
    take_step(module)
    average.update(3)
    again.update(3)
    assert all(torch.equal(value, again.state_tensors()[name]) for name, value in average.state_tensors().items())


def test_loaded_before_its_start_it_is_still_the_weights() -> None:
    module = OneNumber(1.0)
    average = AveragedWeights(module, EmaSettings(decay=0.5, start=10))
    average.load_tensors({"trained": torch.tensor([1.0])})
    nn.init.constant_(module.trained, 2.0)
    average.update(4)
    assert average.state_tensors()["trained"].item() == 2.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "precision"), [("zero1", "no"), ("zero2_offload", "no"), ("zero3", "no"), ("zero3", "bf16")]
)
def test_under_zero_each_process_averages_its_part_and_the_whole_is_that_of_one_process(
    strategy: str, precision: str, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("averaging_run.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", str(script), strategy, precision, str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["numbers_held"] < found["numbers"]
    assert found["from_the_weights_by_hand"] < 1e-6
    assert found["inside_from_the_average"] < 1e-6
    assert found["weights_as_before"] and found["loaded_as_saved"]
