"""train/engine/reporting.py: rows of the log, what a resumed run does with old ones, console line, trackers."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from data_pipeline.errors import UserError
from data_pipeline.settings import load_settings
from train.engine.reporting import Report, console_line, cut_rows, learning_rates
from train.model_card import write_card
from train.settings import TrainSettings

NOTHING = torch.tensor(float("nan"))


def settings_in(folder: Path, *changes: str) -> TrainSettings:
    plain = ["task=subject", "name=run", f"runs_dir={folder}", "steps=2000", "batch_size=4", "report.trackers=[]"]
    return load_settings(TrainSettings, [], [*plain, *changes])


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    opened = Accelerator(cpu=True)
    yield opened
    for tracker in opened.trackers:
        tracker.finish()


def rows_of(folder: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]


def log_a_row(report: Report, step: int, **metrics: float) -> None:
    report.forward_pass({name: torch.tensor(value) for name, value in metrics.items()})
    report.log(step, {"rest": 1e-3}, skipped=0, gradient_norm=1.5)


def test_a_metric_is_averaged_over_the_passes_that_say_something_about_it(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    report = Report(settings_in(tmp_path), accelerator, done=0)
    report.forward_pass({"loss": torch.tensor(1.0), "denoising_t0": torch.tensor(4.0), "denoising_t1": NOTHING})
    report.forward_pass({"loss": torch.tensor(float("inf")), "denoising_t0": NOTHING, "denoising_t1": NOTHING})
    report.forward_pass({"loss": torch.tensor(2.0), "denoising_t0": torch.tensor(5.0), "denoising_t1": NOTHING})
    report.log(3, {"rest": 1e-3}, skipped=1, gradient_norm=float("nan"))
    (row,) = rows_of(tmp_path)
    assert row["loss"] == 1.5 and row["denoising_t0"] == 4.5
    assert row["denoising_t1"] is None and row["gradient_norm"] is None
    assert row["skipped"] == 1


def test_a_row_starts_anew_after_the_last_one_and_counts_samples_of_all_steps(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    report = Report(settings_in(tmp_path, "accumulate=3"), accelerator, done=1_234_560)
    log_a_row(report, 1_234_561, loss=1.0)
    log_a_row(report, 1_234_567, loss=3.0)
    first, second = rows_of(tmp_path)
    assert (first["loss"], second["loss"]) == (1.0, 3.0)
    assert second["step"] == 1_234_567 and second["samples"] == 1_234_567 * 12


def test_metrics_that_change_their_names_are_refused(tmp_path: Path, accelerator: Accelerator) -> None:
    report = Report(settings_in(tmp_path), accelerator, done=0)
    report.forward_pass({"loss": NOTHING})
    with pytest.raises(ValueError, match="metrics loss, other: expected loss at every"):
        report.forward_pass({"loss": NOTHING, "other": NOTHING})


def test_speed_is_of_training_alone_and_the_share_of_waiting_is_told(tmp_path: Path, accelerator: Accelerator) -> None:
    report = Report(settings_in(tmp_path), accelerator, done=0)
    start = time.perf_counter()
    with report.waiting():
        time.sleep(0.1)
    waited = time.perf_counter() - start
    time.sleep(0.1)
    took = time.perf_counter() - start
    with report.away():
        time.sleep(0.4)
    report.forward_pass({"loss": torch.tensor(1.0)})
    row = report.log(10, {"rest": 1e-3}, skipped=0, gradient_norm=1.0)
    assert row["samples_per_second"] == pytest.approx(40 / took, rel=0.3)
    assert row["data_wait_share"] == pytest.approx(waited / took, rel=0.3)
    assert row["seconds_left"] == pytest.approx(1990 * took / 10, rel=0.3)
    assert row["memory_gb"] is not None and 0.05 < row["memory_gb"] < 50


def test_floating_point_operations_of_the_first_step_give_the_speed_and_no_share_where_the_peak_is_unknown(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    report = Report(settings_in(tmp_path), accelerator, done=0)
    for _ in range(2):
        with report.flops.counting():
            nn.functional.linear(torch.ones(1000, 100), torch.ones(100, 100))
    report.forward_pass({"loss": torch.tensor(1.0)})
    row = report.log(2, {"rest": 1e-3}, skipped=0, gradient_norm=1.0)
    seconds_a_step = 4 / row["samples_per_second"]  # type: ignore[operator]
    assert row["tflops_per_second"] == pytest.approx(2e7 / seconds_a_step / 1e12, rel=1e-3)
    assert row["mfu"] is None
    report.peak = 1e12
    report.forward_pass({"loss": torch.tensor(1.0)})
    row = report.log(3, {"rest": 1e-3}, skipped=0, gradient_norm=1.0)
    assert row["mfu"] == pytest.approx(row["tflops_per_second"], rel=1e-3)


def test_each_group_has_its_learning_rate_and_the_rest_has_the_plain_name(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [
        {"params": parameters[:1], "lr": 1e-6, "name": "adapter"},
        {"params": parameters[1:], "lr": 1e-4, "name": "rest"},
    ]
    report = Report(settings_in(tmp_path), accelerator, done=0)
    report.forward_pass({"loss": NOTHING})
    row = report.log(1, learning_rates(torch.optim.AdamW(groups)), skipped=0, gradient_norm=1.0)
    assert row["learning_rate"] == 1e-4 and row["learning_rate_adapter"] == 1e-6
    assert learning_rates(torch.optim.AdamW(parameters, lr=0.5)) == {"0": 0.5}


def test_a_resumed_run_holds_no_row_twice(tmp_path: Path, accelerator: Accelerator) -> None:
    report = Report(settings_in(tmp_path), accelerator, done=0)
    for step in (10, 20, 30):
        log_a_row(report, step, loss=1.0)
    for name in ("validation.jsonl", "skipped.jsonl"):
        (tmp_path / "run" / name).write_text('{"step": 20}\n{"step": 30}\n')
    again = Report(settings_in(tmp_path), accelerator, done=20)
    log_a_row(again, 30, loss=2.0)
    assert [(row["step"], row["loss"]) for row in rows_of(tmp_path)] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert rows_of(tmp_path, "validation.jsonl") == rows_of(tmp_path, "skipped.jsonl") == [{"step": 20}]


def test_a_row_that_a_kill_cut_short_is_dropped(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 10, "loss": 1}\n{"step": 20, "lo')
    cut_rows(log, after=50)
    assert log.read_text() == '{"step": 10, "loss": 1}\n'


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path, accelerator: Accelerator) -> None:
    report = Report(settings_in(tmp_path), accelerator, done=0)
    (tmp_path / "run" / "log.jsonl").mkdir()
    with pytest.raises(UserError, match=r"log\.jsonl: cannot be written \(Is a directory\)"):
        log_a_row(report, 10, loss=1.0)


def test_the_console_line_is_short(tmp_path: Path) -> None:
    row = {
        "step": 250, "samples": 1000, "loss": 0.08123, "denoising": 0.08, "denoising_t0": 0.1, "learning_rate": 0.0015,
        "gradient_norm": 1.0, "samples_per_second": 84.31, "data_wait_share": 0.004, "memory_gb": 1.94,
        "tflops_per_second": 310.0, "mfu": 0.3134, "seconds_left": 5400.0, "skipped": 2,
    }  # fmt: skip
    assert console_line(settings_in(tmp_path), row) == (
        "run  step 250/2,000  loss 0.08123  denoising 0.08  lr 0.0015  84.31 samples/s  wait 0.4%  1.9 GB  MFU 31%  "
        "skipped 2  90 min left"
    )
    unknown = console_line(settings_in(tmp_path), row | {"mfu": None, "loss": None, "denoising": None, "skipped": 0})
    assert "310 TFLOP/s" in unknown and "loss not finite" in unknown and "skipped" not in unknown


def test_tensorboard_holds_the_figures_and_the_validation_picture_and_forgets_what_was_redone(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    settings = settings_in(tmp_path, "report.trackers=[tensorboard]")
    picture = tmp_path / "step.png"
    Image.new("RGB", (6, 4), "red").save(picture)
    report = Report(settings, accelerator, done=0)
    for step, loss in ((10, 1.0), (20, 2.0)):
        log_a_row(report, step, loss=loss, denoising_t0=float("nan"))
    report.validation(20, {"gain": 0.25}, picture)
    report.close()
    again = Report(settings, accelerator, done=10)
    log_a_row(again, 20, loss=3.0)
    again.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "subject-diffusion"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 1.0), (20, 3.0)]
    assert "train/denoising_t0" not in events.Tags()["scalars"]
    assert rows_of(tmp_path, "validation.jsonl") == []  # of step 20, which the second run has to reach again
    first = EventAccumulator(str(min((tmp_path / "run" / "tensorboard" / "subject-diffusion").iterdir())))
    first.Reload()
    assert first.Scalars("validation/gain")[0].value == 0.25
    assert (first.Images("validation")[0].width, first.Images("validation")[0].height) == (6, 4)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_refused_in_one_line(tmp_path: Path, accelerator: Accelerator) -> None:
    with pytest.raises(UserError, match=r"report\.trackers: wandb is not installed; pip install wandb"):
        Report(settings_in(tmp_path, "report.trackers=[wandb]"), accelerator, done=0)


def test_the_model_card_adds_up_the_time_of_the_rows(tmp_path: Path, accelerator: Accelerator) -> None:
    settings = settings_in(tmp_path, "data.shards={laion: {folder: x}}", "ema.decay=0.99")
    (tmp_path / "run").mkdir()
    rows = [(50, 200, 0.5), (100, 400, 0.25), (110, 440, 0.1)]  # 400, 800 and 400 seconds
    text = "".join(json.dumps({"step": n, "samples": s, "samples_per_second": v}) + "\n" for n, s, v in rows)
    (tmp_path / "run" / "log.jsonl").write_text(text)
    card = write_card(settings, "some/base", 12, "one GPU")
    assert "| time | 0.44 h on one GPU" in card and "110 of 4 samples (440 samples)" in card
    assert "shards `laion`; seed 0" in card and "EMA 0.99" in card and "toybox scenes" not in card
    assert "gone on from" not in card
    for given, told in (("toybox/subject", "toybox/subject"), (str(tmp_path / "parts"), "parts")):
        later = settings.model_copy(update={"inputs": {"subject": given}})
        assert f", gone on from the subject model `{told}` |" in write_card(later, "some/base", 12, "one GPU")
