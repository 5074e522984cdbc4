"""A run that was stopped at any moment ends with the weights of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.errors import UserError
from tests.train.data.scene_shards import ALL, scene_shards
from tests.train.tiny_runs import tiny_settings
from train import loop
from train.engine.checkpoints import list_checkpoints
from train.loop import train


def final_weights(run: Path) -> dict[str, Tensor]:
    newest = list_checkpoints(run / "checkpoints")[-1]
    return load_file(newest / "model.safetensors") | {
        f"ema.{n}": t for n, t in load_file(newest / "ema.safetensors").items()
    }


def assert_bitwise_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


class Died(Exception):
    pass


def stream_changes(folder: Path) -> dict[str, Any]:
    """Shards and toybox scenes mixed, read by two processes, references varied, nothing cached."""
    source = {"folder": str(scene_shards()), "weight": 2.0, "filters": ALL}
    references = {"source": "other_image", "flip": 0.5, "rotation_degrees": 10.0, "perspective": 0.5}
    return {
        "data__shards": {"mine": source}, "data__toybox__weight": 1.0, "data__references": references,
        "data__scratch": str(folder / "scratch"), "data__cache_scenes": 0, "data__workers": 2,
    }  # fmt: skip


@pytest.mark.parametrize("data", ["vae", "subject from pools", "subject from shards and toybox"])
def test_a_run_that_died_between_checkpoints_resumes_bitwise(
    data: str, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("clip", "base"):
        shutil.copytree(chain / part / "export", tmp_path / part / "export")
    changes = stream_changes(tmp_path) if "shards" in data else {}
    whole = tiny_settings(data.split()[0], tmp_path, name="whole", steps=5, **changes)
    train(whole)

    stopped = tiny_settings(data.split()[0], tmp_path, name="stopped", steps=5, **changes)
    real_step = loop._Run._step

    def step_that_dies(run: loop._Run, batches: Iterator[Any]) -> None:
        if run.state.step == 3:
            raise Died
        real_step(run, batches)

    monkeypatch.setattr(loop._Run, "_step", step_that_dies)
    with pytest.raises(Died):
        train(stopped)
    assert [path.name for path in list_checkpoints(stopped.folder / "checkpoints")] == ["step-00000002"]
    monkeypatch.setattr(loop._Run, "_step", real_step)
    train(stopped)
    assert_bitwise_equal(final_weights(whole.folder), final_weights(stopped.folder))
    losses = [
        [json.loads(line)["loss"] for line in (run.folder / "log.jsonl").read_text().splitlines()]
        for run in (whole, stopped)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_it_writes_a_checkpoint_and_leaves(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_step = loop._Run._step

    def signal_then_step(run: loop._Run, batches: Iterator[Any]) -> None:
        os.kill(os.getpid(), number)
        real_step(run, batches)

    monkeypatch.setattr(loop._Run, "_step", signal_then_step)
    settings = tiny_settings("vae", tmp_path, steps=5)
    train(settings)
    assert [path.name for path in list_checkpoints(settings.folder / "checkpoints")] == ["step-00000001"]
    assert not (settings.folder / "export").exists()


def test_gradients_that_stay_non_finite_stop_the_run_and_name_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = tiny_settings("vae", tmp_path, steps=30, optimizer__learning_rate=1e30, optimizer__warmup_steps=0)
    with pytest.raises(UserError, match="not finite in 10 steps on end .*samples sample .*optimizer.learning_rate"):
        train(settings)


def test_a_checkpoint_of_another_shape_is_refused_in_one_line(tmp_path: Path) -> None:
    train(tiny_settings("vae", tmp_path, steps=1))
    sizes = yaml.safe_load((tmp_path / "sizes.yaml").read_text())
    sizes["architecture"]["vae"]["latent_channels"] = 5
    (tmp_path / "sizes.yaml").write_text(yaml.safe_dump(sizes))
    with pytest.raises(UserError, match="does not fit this model") as error:
        train(tiny_settings("vae", tmp_path, steps=2))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_killed_with_sigkill_again_and_again_it_ends_with_the_same_weights(tmp_path: Path) -> None:
    whole = tiny_settings("vae", tmp_path, name="whole", steps=40, report__checkpoint_every=3)
    train(whole)
    arguments = [f"{key}={value}" for key, value in {
        "task": "vae", "name": "killed", "runs_dir": tmp_path, "model": tmp_path / "sizes.yaml", "steps": 40,
        "batch_size": 4, "report.log_every": 1, "report.checkpoint_every": 3, "report.validate_every": 100,
        "report.trackers": "[]", "data.size": 32,
        "data.workers": 0, "data.cache_scenes": 8, "options.code_steps": 2,
    }.items()]  # fmt: skip
    (tmp_path / "empty.yaml").write_text("")
    command = [sys.executable, "train/run.py", "--config", str(tmp_path / "empty.yaml"), *arguments]
    # One thread, as in this process: sums of other thread counts differ in their last bits.
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    checkpoints = tmp_path / "killed" / "checkpoints"
    for kills in range(4):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **options)
        known = len(list(checkpoints.glob("step-*"))) if checkpoints.exists() else 0
        deadline = time.monotonic() + 60
        newest = max((path.name for path in checkpoints.glob("step-*")), default="") if known else ""
        while process.poll() is None and time.monotonic() < deadline:
            if max((path.name for path in checkpoints.glob("step-*")), default="") > newest:
                break
            time.sleep(0.02)
        time.sleep(0.05 * kills)
        process.kill()
        process.wait()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, **options)
    assert_bitwise_equal(final_weights(whole.folder), final_weights(tmp_path / "killed"))
