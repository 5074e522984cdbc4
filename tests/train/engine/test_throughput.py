"""train/engine/throughput.py: operations of a step, counted by hand, and the peaks of known GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from train.engine.throughput import StepFlops, peak_flops
from train.settings import EngineSettings

FORWARD = 2 * 5 * (8 * 16 + 16 * 4)
BACKWARD = 2 * 5 * (8 * 16 + 2 * 16 * 4)  # both weights, and the input of the second layer


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("recompute", [False, True])
def test_forward_and_backward_count_and_what_checkpointing_computes_again_does_not(recompute: bool) -> None:
    flops, layers, x = StepFlops(), network(), torch.randn(5, 8)
    with flops.counting():
        y = checkpoint(layers, x, use_reentrant=False) if recompute else layers(x)
        y.sum().backward()
    assert flops.total == FORWARD + BACKWARD


def test_frozen_layers_cost_no_gradients_of_their_own() -> None:
    flops, layers = StepFlops(), network()
    layers[0].requires_grad_(False)
    with flops.counting():
        layers(torch.randn(5, 8)).sum().backward()
    assert flops.total == FORWARD + 2 * 5 * 16 * 4


def test_only_the_first_step_is_counted() -> None:
    flops, layers = StepFlops(), network()
    for count in (5, 50):
        with flops.counting():
            layers(torch.randn(count, 8))
    assert flops.total == FORWARD


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [("NVIDIA H100 80GB HBM3", "bf16", 989.4), ("NVIDIA A100-SXM4-80GB", "no", 156.0), ("Some GPU", "bf16", None)],
)
def test_the_peak_is_that_of_the_gpu_and_precision_or_unknown(
    name: str, precision: str, tflops: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    peak = peak_flops(torch.device("cuda"), EngineSettings(precision=precision))
    assert peak == (tflops and pytest.approx(tflops * 1e12))


def test_a_cpu_has_no_stated_peak() -> None:
    assert peak_flops(torch.device("cpu"), EngineSettings()) is None
