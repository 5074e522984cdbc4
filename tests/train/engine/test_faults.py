"""train/engine/faults.py: signals, steps that are not finite, and processes that die, alone and among two processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from data_pipeline.errors import UserError
from data_pipeline.settings import load_settings
from train.engine.faults import FaultWatch, leave_signals_to_the_loop
from train.settings import TrainSettings

Together = tuple[list[dict[str, Any]], Path]
GOOD, BAD = torch.tensor(1.0), torch.tensor(float("inf"))


def settings_in(folder: Path) -> TrainSettings:
    return load_settings(
        TrainSettings, [], ["task=vae", "name=run", f"runs_dir={folder}", "steps=9", "optimizer.max_skipped=2"]
    )


@pytest.fixture
def watch(tmp_path: Path) -> FaultWatch:
    return FaultWatch(settings_in(tmp_path), Accelerator(cpu=True), skipped=5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_known_after_the_step_and_handlers_are_given_back(
    watch: FaultWatch, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    with watch:
        assert watch.after_step(0, True, []) and watch.stop is None
        os.kill(os.getpid(), number)
        assert watch.stop is None
        watch.after_step(1, True, [])
        assert watch.stop == number.name
    assert signal.getsignal(number) is before


def test_a_run_that_has_used_its_minutes_is_asked_to_stop(tmp_path: Path) -> None:
    settings = settings_in(tmp_path).model_copy(update={"minutes": 0.2 / 60})
    watch = FaultWatch(settings, Accelerator(cpu=True))
    watch.after_step(0, True, [])
    assert watch.stop is None
    time.sleep(0.25)
    watch.after_step(1, True, [])
    assert watch.stop == "minutes"


def test_skipped_steps_are_counted_on_and_their_samples_written_down(watch: FaultWatch, tmp_path: Path) -> None:
    assert not watch.after_step(3, False, [(GOOD, ["toybox/1"]), (BAD, ["toybox/2", "toybox/3"])])
    assert watch.after_step(4, True, [(GOOD, ["toybox/4"])])
    assert not watch.after_step(5, False, [(GOOD, ["toybox/5"]), (GOOD, ["toybox/6"])])
    assert watch.skipped == 7
    rows = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert rows == [{"step": 4, "keys": ["toybox/2", "toybox/3"]}, {"step": 6, "keys": ["toybox/5", "toybox/6"]}]


def test_too_many_skipped_steps_on_end_stop_the_run_in_one_line_naming_step_samples_and_cure(watch: FaultWatch) -> None:
    watch.after_step(6, False, [(BAD, ["laion/00003/000030007"])])
    with pytest.raises(UserError) as error:
        watch.after_step(7, False, [(BAD, [f"laion/00003/{n}" for n in range(11)])])
    text = str(error.value)
    assert "not finite in 2 steps on end" in text and "step 8" in text and "\n" not in text
    assert "laion/00003/0" in text and "and 3 more" in text and "optimizer.learning_rate" in text


class Slow(Dataset[int]):
    """Items that take a moment, so that a signal meets the loading process at work."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> int:
        time.sleep(0.05)
        return index


def test_a_signal_to_every_process_of_the_job_leaves_loading_alive_until_the_step_is_done(watch: FaultWatch) -> None:
    loader = DataLoader(Slow(), num_workers=1, worker_init_fn=leave_signals_to_the_loop, persistent_workers=True)
    with watch:
        batches = iter(loader)
        seen = [int(next(batches))]
        for worker in batches._workers:
            os.kill(worker.pid, signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        seen += [int(batch) for batch in batches]
        watch.after_step(0, True, [])
    assert seen == list(range(6)) and watch.stop == "SIGTERM"


def test_a_loading_process_that_was_killed_is_told_in_one_line(watch: FaultWatch) -> None:
    loader = DataLoader(Slow(), num_workers=1, worker_init_fn=leave_signals_to_the_loop)
    with pytest.raises(UserError, match=r"a loading process died .*data\.workers"), watch:
        batches = iter(loader)
        next(batches)
        for worker in batches._workers:
            os.kill(worker.pid, signal.SIGKILL)
        for _ in batches:
            time.sleep(0.05)


# torch aborts a process on its way out when the main one, which holds their store, was faster.
ENDED = (2, -signal.SIGABRT)


def run_two(scenario: str, folder: Path) -> list[tuple[int, str]]:
    """Exit status and error output of process 0 and 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("faults_run.py")), scenario, str(folder)]
    started = []
    for rank in range(2):
        together = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in together.items()}
        started.append(subprocess.Popen(
            command, env=environment | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        ))  # fmt: skip
    try:
        errors = [process.communicate(timeout=120)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, error) for process, error in zip(started, errors, strict=True)]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    """What two processes of one run told, and the run's folder."""
    folder = tmp_path_factory.mktemp("together")
    ended = run_two("together", folder)
    assert [status for status, _ in ended] == [0, 0], ended
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], folder / "run"


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(together: Together) -> None:
    assert [told["signal"] for told in together[0]] == [{"step": 3, "stop": "SIGUSR1"}] * 2


def test_a_step_that_one_of_two_cannot_take_is_skipped_by_both_and_names_its_samples(together: Together) -> None:
    found, folder = together
    assert [told["skips"] for told in found] == [{"taken": [True, False, False, True, False], "skipped": 3}] * 2
    rows = [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert rows[0] == {"step": 2, "keys": ["laion/00007/11", "laion/00007/12"]}
    assert len(rows[1]["keys"]) == 6  # every loss was finite: all samples of the step
    assert rows[2]["keys"] == ["laion/00007/01", "laion/00007/02"]


def test_a_row_of_the_log_holds_the_means_over_both_processes(together: Together) -> None:
    (first, second), folder = together
    assert first["row"]["loss"] == pytest.approx((1 + 2 + 3) / 3)  # process 1 knew nothing at its second pass
    assert first["row"]["entities_per_sample"] == pytest.approx((3 + 0 + 3 + 1) / 8)
    assert first["row"]["samples"] == 8 and second["row"]["loss"] == first["row"]["loss"]
    rows = (folder / "log.jsonl").read_text().splitlines()
    assert len(rows) == 1 and json.loads(rows[0])["loss"] == pytest.approx(2)


def test_too_many_skipped_steps_end_both_and_the_main_process_tells_why(tmp_path: Path) -> None:
    (main, told), (other, silent) = run_two("end", tmp_path)
    assert main == 2 and other in ENDED
    assert "not finite in 3 steps on end" in told and "laion/00007/11" in told
    assert "error:" not in silent


def test_the_death_of_one_process_ends_the_other_in_one_line_without_waiting(tmp_path: Path) -> None:
    (main, told), (other, own) = run_two("death", tmp_path)
    assert main == 2 and "lost another process" in told and "Traceback" not in told
    assert other != 0 and "out of memory" in own


def test_shards_that_differ_between_two_processes_end_both_before_the_first_step(tmp_path: Path) -> None:
    told = "error: data.shards.laion: differs on process 1 from that on process 0"
    assert all(status in ENDED and told in error for status, error in run_two("data", tmp_path))
