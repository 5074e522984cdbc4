"""Every strategy, under every launcher, trains as one process does; what cannot work is one clear line."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import UserError
from tests.train.engine.strategy_run import run, small_settings
from train.engine.checkpoints import list_checkpoints
from train.engine.strategies import finish_step, open_accelerator, prepare

ROOT = Path(__file__).parents[3]
ZERO = ("zero1", "zero2", "zero3", "zero2_offload")


def launch(runs: Sequence[dict[str, Any]], launcher: str = "torchrun", *, succeeds: bool = True) -> str:
    """Do `runs`, one after another, in two processes of their own, in one under `python`; returns what they said."""
    command = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--no_local_rank", "--num_gpus", "2"],
        "python": [sys.executable],
    }[launcher]
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "LOCAL_SIZE": "2"}
    environment |= {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = [*command, str(ROOT / "tests/train/engine/strategy_run.py"), json.dumps(list(runs))]
    done = subprocess.run(script, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode == 0) == succeeds, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout + done.stderr


OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE")


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def saved(folder: Path) -> dict[str, Tensor]:
    """Weights, averages and the optimiser's state at the end of a run."""
    newest = list_checkpoints(folder / "small" / "checkpoints")[-1]
    files = ("model", "ema", "optimizer")
    return {f"{file} {n}": t for file in files for n, t in load_file(newest / f"{file}.safetensors").items()}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if not name.endswith("seen"):  # counts forward passes of one process
            torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of batch 8 in one process, as plain as it can be."""
    folder = tmp_path_factory.mktemp("alone")
    run({"folder": str(folder), "strategy": "ddp", "steps": 3, "batch_size": 8})
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same three steps in two processes of batch 4; and four of which the second is not finite in one process."""
    folder = tmp_path_factory.mktemp("together")
    runs = [{"folder": str(folder / s), "strategy": s, "steps": 3} for s in ("ddp", "zero2")]
    runs += [{**one, "folder": f"{one['folder']}-bad", "steps": 4, "not_finite_at": 1} for one in runs]
    launch(runs)
    return folder


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_two_processes_train_as_one_with_twice_the_batch(strategy: str, alone: Path, together: Path) -> None:
    assert report(together / strategy)["processes"] == 2
    assert report(together / strategy)["losses"] == pytest.approx(report(alone)["losses"], abs=1e-6)
    assert_close(saved(together / strategy), saved(alone))


def test_gradients_lie_in_the_buckets_of_the_reductions_not_beside_them(alone: Path, together: Path) -> None:
    assert report(together / "ddp")["gradient_storages"] == 1  # all parameters here fit into one bucket
    assert report(alone)["gradient_storages"] > 1


def test_accumulating_two_passes_trains_as_one_with_twice_the_batch(alone: Path, tmp_path: Path) -> None:
    run({"folder": str(tmp_path), "strategy": "ddp", "steps": 3, "batch_size": 4, "accumulate": 2})
    assert_close(saved(tmp_path), saved(alone))


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_step_that_is_not_finite_in_one_process_is_taken_by_none(strategy: str, together: Path) -> None:
    found = report(together / f"{strategy}-bad")
    assert found["applied"] == [True, False, True, True]
    assert not math.isfinite(found["norms"][1]) and found["skipped"] == 1
    after = saved(together / f"{strategy}-bad")
    assert all(torch.isfinite(value).all() for value in after.values())
    assert after["optimizer gate.step"] == 3
    assert_close(after, saved(together / "ddp-bad"))


def test_a_parameter_without_gradient_is_stepped_as_with_zeros_and_the_norm_is_before_clipping(tmp_path: Path) -> None:
    settings = small_settings({"folder": str(tmp_path), "strategy": "ddp", "steps": 1})
    accelerator = open_accelerator(settings)
    module = torch.nn.ParameterDict({"used": torch.nn.Parameter(torch.tensor([3.0, 4.0])), "not": torch.ones(1)})
    module["not"] = torch.nn.Parameter(torch.ones(1))
    wrapped, optimizer = prepare(accelerator, module, torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9))
    accelerator.backward((module["used"].square() / 2).sum())  # gradient (3, 4): norm 5, clipped to (0.3, 0.4)
    norm, applied = finish_step(accelerator, wrapped, optimizer, max_grad_norm=0.5)
    assert (norm, applied) == (5.0, True)
    torch.testing.assert_close(module["used"].detach(), torch.tensor([2.7, 3.6]))
    assert optimizer.state[module["not"]]["momentum_buffer"] == 0
    assert module["used"].grad is None


def test_a_machine_without_deepspeed_is_told_which_extra_has_it(tmp_path: Path, monkeypatch: Any) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("train.engine.strategies.find_spec", lambda name: None if name == "deepspeed" else found(name))
    with pytest.raises(UserError, match=r"engine.strategy: zero2 needs DeepSpeed.*subject-diffusion\[train\].*ddp"):
        open_accelerator(small_settings({"folder": str(tmp_path), "strategy": "zero2", "steps": 1}))


def test_8_bit_adam_is_refused_with_zero(tmp_path: Path) -> None:
    given = {"folder": str(tmp_path), "strategy": "zero1", "steps": 1, "kind": "adamw8bit"}
    with pytest.raises(UserError, match="optimizer.kind: adamw8bit works with engine.strategy ddp only, not zero1"):
        open_accelerator(small_settings(given))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.skipif(torch.cuda.is_available(), reason="DeepSpeed finds the GPU by itself")
def test_deepspeed_is_told_of_the_cpu_before_a_library_imports_it_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "to be undone afterwards")
    monkeypatch.delenv("DS_ACCELERATOR")
    open_accelerator(small_settings({"folder": str(tmp_path), "strategy": "ddp", "steps": 1}))
    assert os.environ["DS_ACCELERATOR"] == "cpu"


def test_fp16_without_a_gpu_is_refused(tmp_path: Path) -> None:
    given = {"folder": str(tmp_path), "strategy": "ddp", "steps": 1, "precision": "fp16"}
    with pytest.raises(UserError, match="engine.precision: fp16 needs a GPU"):
        open_accelerator(small_settings(given))


def test_one_process_can_train_with_another_precision_afterwards(tmp_path: Path) -> None:
    for precision in ("no", "bf16", "no"):
        given = {"folder": str(tmp_path), "strategy": "ddp", "steps": 1, "precision": precision}
        accelerator = open_accelerator(small_settings(given))
        assert accelerator.mixed_precision == precision


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All strategies in two processes: plain, accumulated, not finite, validated, in bf16 and under ZeRO in fp16."""
    folder = tmp_path_factory.mktemp("everything")
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "accumulated": {"batch_size": 2, "accumulate": 2},
        "bad": {"steps": 4, "not_finite_at": 1},
        "validated": {"validate": True},
        "bf16": {"precision": "bf16"},
        "fp16": {"precision": "fp16"},
    }
    runs = [
        {"folder": str(folder / f"{strategy}-{kind}"), "strategy": strategy, "steps": 3} | changes
        for kind, changes in kinds.items()
        for strategy in ("ddp", *ZERO)
        if kind != "fp16" or (strategy != "ddp" and torch.ops.mkldnn._is_mkldnn_fp16_supported())
    ]
    launch(runs)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", *ZERO])
@pytest.mark.parametrize("kind", ["plain", "accumulated", "validated"])
def test_every_strategy_trains_as_one_process(kind: str, strategy: str, alone: Path, everything: Path) -> None:
    assert_close(saved(everything / f"{strategy}-{kind}"), saved(alone))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ZERO)
def test_every_strategy_skips_the_same_steps(strategy: str, everything: Path) -> None:
    assert report(everything / f"{strategy}-bad")["applied"] == [True, False, True, True]
    assert_close(saved(everything / f"{strategy}-bad"), saved(everything / "ddp-bad"))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ZERO)
def test_validation_in_the_main_process_sees_the_same_averages(strategy: str, everything: Path) -> None:
    wanted = report(everything / "ddp-validated")["shown"]
    assert report(everything / f"{strategy}-validated")["shown"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "strategies"), [("bf16", ("ddp", *ZERO)), ("fp16", ZERO)])
def test_low_precision_stays_near_and_keeps_float32_weights(
    precision: str, strategies: Sequence[str], alone: Path, everything: Path
) -> None:
    if precision == "fp16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this CPU has no fp16")
    for strategy in strategies:
        found = saved(everything / f"{strategy}-{precision}")
        assert_close({n: t for n, t in found.items() if n.startswith("model")},
                     {n: t for n, t in saved(alone).items() if n.startswith("model")}, tolerance=5e-3)  # fmt: skip
        weight = found["model first.weight"]
        assert not torch.equal(weight, weight.bfloat16().float()) and not torch.equal(weight, weight.half().float())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "python"])
def test_other_launchers(launcher: str, alone: Path, tmp_path: Path) -> None:
    batch = {"deepspeed": 4, "python": 8}[launcher]
    launch([{"folder": str(tmp_path), "strategy": "zero3", "steps": 3, "batch_size": batch}], launcher)
    assert_close(saved(tmp_path), saved(alone))
