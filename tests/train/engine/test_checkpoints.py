"""A checkpoint goes on under any strategy and number of processes, survives what goes wrong, and says what is wrong."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.errors import UserError
from tests.train.engine.strategy_run import run
from tests.train.engine.test_strategies import ZERO, assert_close, launch, report, saved
from tests.train.tiny_runs import tiny_settings
from train.engine.checkpoints import list_checkpoints, read_averaged_weights
from train.export_command import export_checkpoint
from train.loop import train


def given(folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run of five steps of eight samples in one process."""
    return {"folder": str(folder), "strategy": "ddp", "steps": 5, "batch_size": 8} | changes


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in list_checkpoints(folder / "small" / "checkpoints")]


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(given(folder))
    return folder


@pytest.fixture
def stopped(whole: Path, tmp_path: Path) -> Path:
    """A run that ended after three steps."""
    run(given(tmp_path, steps=3))
    return tmp_path


def test_a_resumed_run_is_the_undisturbed_one_bit_by_bit(stopped: Path, whole: Path) -> None:
    run(given(stopped))
    assert report(stopped)["resumed"] == 3 and report(stopped)["position"] == {"passes": 3}
    assert report(stopped)["losses"] == report(whole)["losses"][3:]
    assert report(stopped)["norms"] == report(whole)["norms"][3:]
    assert_same(saved(stopped), saved(whole))


def test_a_checkpoint_holds_trained_weights_moments_and_buffers_by_name_and_no_frozen_weights(stopped: Path) -> None:
    newest = list_checkpoints(stopped / "small" / "checkpoints")[-1]
    trained = {
        f"{layer}.{kind}" for layer in ("convolution", "first", "second", "unused") for kind in ("weight", "bias")
    }
    trained |= {"gate"}
    weights, averages = load_file(newest / "model.safetensors"), load_file(newest / "ema.safetensors")
    assert weights.keys() == trained | {"seen"} and averages.keys() == trained
    assert all(averages[name].dtype == weights[name].dtype == torch.float32 for name in trained)
    moments = load_file(newest / "optimizer.safetensors")
    assert moments.keys() == {f"{name}.{key}" for name in trained for key in ("exp_avg", "exp_avg_sq", "step")}
    assert {int(moments[f"{name}.step"]) for name in trained} == {3}
    state = json.loads((newest / "state.json").read_text())
    assert (state["step"], state["skipped"], state["position"]) == (3, 0, {"passes": 3})
    assert state["written_under"] == {"zero_stage": 0, "processes": 1}
    assert [(group["name"], group["lr"]) for group in state["optimizer"]["groups"]] == [
        ("first", 0.02),
        ("second", 0.01),
    ]


def test_only_the_newest_are_kept_and_what_a_kill_left_is_cleared_away(stopped: Path) -> None:
    left = stopped / "small" / "checkpoints" / "step-00000004.part"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    assert checkpoints(stopped) == ["step-00000002", "step-00000003"]
    run(given(stopped, keep=3))
    assert checkpoints(stopped) == ["step-00000003", "step-00000004", "step-00000005"]
    assert not list((stopped / "small" / "checkpoints").glob("*.part"))


def test_before_a_new_one_is_in_place_no_old_one_goes(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    removed = shutil.rmtree

    def remove_and_look(path: Path, **options: Any) -> None:
        seen.append(checkpoints(stopped))
        removed(path, **options)

    monkeypatch.setattr("train.engine.checkpoints.shutil.rmtree", remove_and_look)
    run(given(stopped, steps=4))
    assert seen == [["step-00000003", "step-00000004"]]


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors"])
def test_a_disk_that_is_full_at_any_file_leaves_the_last_checkpoint_good(file: str, stopped: Path, whole: Path) -> None:
    newest = list_checkpoints(stopped / "small" / "checkpoints")[-1]
    room = (newest / file).stat().st_size - 1  # the moments are larger than the weights, so these still fit
    with (
        disk_of(room),
        pytest.raises(UserError, match=r"step-00000004: cannot be written \(.*\); free the disk") as told,
    ):
        run(given(stopped))
    assert "\n" not in str(told.value)
    assert checkpoints(stopped) == ["step-00000002", "step-00000003"]
    run(given(stopped))
    assert_same(saved(stopped), saved(whole))


@pytest.mark.slow
def test_a_full_disk_ends_all_processes_with_the_same_line(tmp_path: Path) -> None:
    two = {"strategy": "zero2", "batch_size": 4}
    told = launch([given(tmp_path, **two, steps=2), given(tmp_path, **two, disk=2000)], succeeds=False)
    assert (
        told.count("step-00000003: cannot be written") >= 1
        and 'Traceback (most recent call last):\n  File "/work' not in told
    )
    assert checkpoints(tmp_path) == ["step-00000001", "step-00000002"]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="a small tmpfs needs the rights to mount")
def test_a_disk_without_space_is_said_to_have_none(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)]).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        with pytest.raises(UserError, match="step-0000000[12]: cannot be written .*(No space left|StorageFull)"):
            run(given(tmp_path))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_without_it_the_run_goes_on(file: str, stopped: Path, whole: Path) -> None:
    newest = list_checkpoints(stopped / "small" / "checkpoints")[-1]
    content = (newest / file).read_bytes()
    (newest / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"step-00000003: damaged .*{file}.*remove it.* the one before") as told:
        run(given(stopped))
    assert "\n" not in str(told.value)
    shutil.rmtree(newest)
    run(given(stopped))
    assert report(stopped)["resumed"] == 2
    assert_same(saved(stopped), saved(whole))


def test_a_checkpoint_of_another_model_is_refused_by_its_first_misfit(stopped: Path) -> None:
    misfit = r"does not fit this model \(model.safetensors, first.bias: \[11\] in the checkpoint, \[12\] in the model\)"
    with pytest.raises(UserError, match=misfit):
        run(given(stopped, width=12))


def test_a_checkpoint_with_a_weight_too_few_is_refused_by_its_name(stopped: Path) -> None:
    file = list_checkpoints(stopped / "small" / "checkpoints")[-1] / "model.safetensors"
    weights = load_file(file)
    weights.pop("gate")
    save_file(weights, file)
    with pytest.raises(UserError, match=r"model.safetensors, gate: missing in the checkpoint, \[1\] in the model"):
        run(given(stopped))


def test_a_checkpoint_of_another_optimiser_or_format_is_refused(stopped: Path) -> None:
    file = list_checkpoints(stopped / "small" / "checkpoints")[-1] / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(state | {"optimizer": state["optimizer"] | {"kind": "AdamW8bit"}}))
    with pytest.raises(UserError, match="written with the optimiser AdamW8bit, this run has AdamW"):
        run(given(stopped))
    file.write_text(json.dumps({"step": 3, "optimizer": []}))
    with pytest.raises(UserError, match="state.json is not of format 2"):
        run(given(stopped))


@pytest.fixture(scope="module")
def converted(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """zero2 in two processes, whole and stopped; and the checkpoint of one process gone on with in two."""
    folder = tmp_path_factory.mktemp("converted")
    run(given(folder / "from-one", steps=3))
    two = {"strategy": "zero2", "batch_size": 4}
    launch(
        [
            given(folder / "whole", **two), given(folder / "stopped", **two, steps=3),
            given(folder / "stopped", **two), given(folder / "to-one", **two, steps=3),
            given(folder / "from-one", **two),
        ]
    )  # fmt: skip
    return folder


def test_under_zero_too_a_resumed_run_is_the_undisturbed_one_bit_by_bit(converted: Path) -> None:
    assert report(converted / "stopped")["resumed"] == 3
    assert report(converted / "stopped")["losses"] == report(converted / "whole")["losses"][3:]
    assert_same(saved(converted / "stopped"), saved(converted / "whole"))


def test_what_one_process_wrote_goes_on_as_zero2_in_two(converted: Path, whole: Path) -> None:
    assert report(converted / "from-one")["resumed"] == 3 and report(converted / "from-one")["processes"] == 2
    assert_close(saved(converted / "from-one"), saved(whole), tolerance=2e-6)


def test_what_zero2_wrote_in_two_processes_goes_on_in_one(converted: Path, whole: Path) -> None:
    run(given(converted / "to-one"))
    assert report(converted / "to-one")["resumed"] == 3
    assert_close(saved(converted / "to-one"), saved(whole), tolerance=2e-6)


@pytest.mark.slow
def test_every_strategy_resumes_bitwise_and_converts_both_ways(whole: Path, tmp_path: Path) -> None:
    half = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    kinds = [(s, p) for s in ("ddp", *ZERO) for p in ("no", "bf16", "fp16") if p != "fp16" or (half and s != "ddp")]
    run(given(tmp_path / "one", steps=3))
    runs = []
    for strategy, precision in kinds:
        name, two = f"{strategy}-{precision}", {"strategy": strategy, "batch_size": 4, "precision": precision}
        runs += [given(tmp_path / f"{name}-whole", **two), given(tmp_path / f"{name}-again", **two, steps=3)]
        runs += [given(tmp_path / f"{name}-again", **two), given(tmp_path / f"{name}-to-one", **two, steps=3)]
        if precision == "no":
            shutil.copytree(tmp_path / "one", tmp_path / f"{strategy}-from-one")
            runs.append(given(tmp_path / f"{strategy}-from-one", **two))
    launch(runs)
    for strategy, precision in kinds:
        name = f"{strategy}-{precision}"
        assert report(tmp_path / f"{name}-again")["losses"] == report(tmp_path / f"{name}-whole")["losses"][3:]
        assert_same(saved(tmp_path / f"{name}-again"), saved(tmp_path / f"{name}-whole"))
        run(given(tmp_path / f"{name}-to-one"))
        if precision == "no":
            assert_close(saved(tmp_path / f"{name}-to-one"), saved(whole), tolerance=2e-6)
            assert_close(saved(tmp_path / f"{strategy}-from-one"), saved(whole), tolerance=2e-6)


def test_a_checkpoint_is_exported_as_the_plain_parts_of_its_average(tmp_path: Path) -> None:
    settings = tiny_settings("vae", tmp_path, steps=1)
    train(settings)
    newest = list_checkpoints(settings.folder / "checkpoints")[-1]
    written = export_checkpoint(settings, newest, tmp_path / "parts")
    exported = load_file(next(written.rglob("diffusion_pytorch_model.safetensors")))
    by_the_run = load_file(next((settings.folder / "export").rglob("diffusion_pytorch_model.safetensors")))
    assert_same(exported, by_the_run)
    averages = read_averaged_weights(newest)
    assert_same({name: exported[name.split(".", 1)[1]].float() for name in averages}, averages)


def test_an_export_without_a_checkpoint_or_from_a_damaged_one_is_refused(tmp_path: Path) -> None:
    settings = tiny_settings("vae", tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint; train first"):
        export_checkpoint(settings)
    with pytest.raises(UserError, match="no checkpoint, or a damaged one"):
        export_checkpoint(settings, tmp_path)
