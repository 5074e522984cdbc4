"""train/engine/profiling.py: the profiler's window, on real steps."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from data_pipeline.errors import UserError
from data_pipeline.settings import load_settings
from train.engine.profiling import ProfileWindow
from train.settings import TrainSettings


def window(folder: Path, *changes: str) -> ProfileWindow:
    plain = ["task=vae", "name=run", f"runs_dir={folder}", "steps=8", "report.profile_steps=2"]
    return ProfileWindow(load_settings(TrainSettings, [], [*plain, *changes]), Accelerator(cpu=True))


def run_steps(profile: ProfileWindow, steps: range) -> None:
    """Step s multiplies matrices s + 1 times."""
    for step in steps:
        profile.before(step)
        for _ in range(step + 1):
            torch.ones(20, 20) @ torch.ones(20, 20)
        profile.after(step)
    profile.close()


def products_traced(folder: Path) -> int:
    with gzip.open(folder / "run" / "profile" / "trace.json.gz", "rt") as handle:
        events = json.load(handle)["traceEvents"]
    return sum(event.get("name") == "aten::matmul" for event in events)


def test_the_steps_after_one_of_warm_up_are_traced(tmp_path: Path) -> None:
    run_steps(window(tmp_path, "report.profile_at=2"), range(8))
    assert products_traced(tmp_path) == 4 + 5
    assert "aten::matmul" in (tmp_path / "run" / "profile" / "table.txt").read_text()


def test_a_run_that_ends_inside_the_window_leaves_what_there_is(tmp_path: Path) -> None:
    run_steps(window(tmp_path, "report.profile_at=2"), range(4))
    assert products_traced(tmp_path) == 4


def test_switched_off_or_passed_before_a_resume_it_does_nothing(tmp_path: Path) -> None:
    run_steps(window(tmp_path), range(8))
    run_steps(window(tmp_path, "report.profile_at=2"), range(3, 8))
    assert not (tmp_path / "run").exists()


def test_a_window_beyond_the_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report\.profile_at=6: a step of warm-up and 2 recorded .* run of 8 steps"):
        window(tmp_path, "report.profile_at=6")
    window(tmp_path, "report.profile_at=5")
