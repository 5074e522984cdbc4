"""scripts/bench_generate.py: what it times does the same work, every work has its turn, the worst ratio is judged."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.errors import run_command
from infer.pipeline import SubjectDiffusionPipeline
from infer.subjects import Subject
from scripts import bench_generate as bench
from tests.infer.tiny_model import TinyModel
from tests.model.tiny import tiny_unet

CPU = torch.device("cpu")


@torch.no_grad()
def results(works: dict[str, bench.Work]) -> dict[str, torch.Tensor]:
    return {name: work() for name, work in works.items()}


def test_every_work_is_called_once_before_the_clock_and_then_takes_turns() -> None:
    called: list[str] = []
    works = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = bench.median_seconds(works, repeats=2, device=CPU, calls=1)
    assert called == ["a", "b", "a", "b", "b", "a"]
    assert list(seconds) == ["a", "b"] and min(seconds.values()) > 0


@pytest.mark.parametrize("subject_tokens", [4, 8])
def test_both_adapter_layers_compute_the_same(subject_tokens: int) -> None:
    made = results(bench.layer_works(16, 2, 4, 24, subject_tokens, CPU, torch.float32))
    torch.testing.assert_close(made["ours"], made["diffusers"], atol=1e-6, rtol=0)


def test_a_step_with_our_adapter_is_that_of_the_gligen_unet_and_leaves_the_null_row_plain() -> None:
    made = results(bench.step_works(tiny_unet(), patches=4, patch_width=12, subject_counts=(1, 2)))
    adapted = [f"{whose}, {count}" for count in ("1 subject", "2 subjects") for whose in ("ours", "diffusers")]
    assert list(made) == ["plain", *adapted]
    for count in ("1 subject", "2 subjects"):
        null, full = made[f"ours, {count}"]
        torch.testing.assert_close(full, made[f"diffusers, {count}"][1], atol=1e-5, rtol=0)
        torch.testing.assert_close(null, made["plain"][0], atol=1e-6, rtol=0)
        assert not torch.allclose(full, made["plain"][1], atol=1e-3)
    assert not torch.allclose(made["ours, 1 subject"][1], made["ours, 2 subjects"][1], atol=1e-4)


def test_a_step_with_our_adapter_computes_the_full_row_only() -> None:
    operations = {}
    for name, work in bench.step_works(tiny_unet(), patches=4, patch_width=12, subject_counts=(1,)).items():
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            work()
        operations[name] = counter.get_total_flops()
    added = {whose: operations[f"{whose}, 1 subject"] - operations["plain"] for whose in ("ours", "diffusers")}
    assert 0 < added["ours"] < added["diffusers"] / 2


def test_whole_pictures_are_timed_for_every_number_of_subjects(
    tiny_model: TinyModel, loaded_pipeline: SubjectDiffusionPipeline, cutout: Callable[..., Image.Image]
) -> None:
    plain = StableDiffusionPipeline.from_pretrained(tiny_model.base, safety_checker=None)
    plain.set_progress_bar_config(disable=True)
    subjects = [Subject(noun, [cutout(seed)]) for seed, noun in enumerate(("dog", "mug"))]
    works = bench.toybox_works(plain, loaded_pipeline, "a dog and a mug", subjects, steps=1, batch=2)
    assert list(works) == [
        "plain",
        "ours, no subject",
        "ours, 1 subject",
        "ours, 2 subjects",
        "ours, 1 subject, three branches",
    ]
    drawn = results(works)
    assert all([picture.size for picture in pictures] == [(64, 64)] * 2 for pictures in drawn.values())
    assert min(bench.median_seconds(works, repeats=1, device=CPU).values()) > 0


def test_a_bar_is_read_from_the_worst_ratio_as_it_is_printed() -> None:
    assert bench.bar("picture", 1.4, "plain", [1.1, 1.4049]) == "bar: picture <= 1.4 x plain: 1.40 (met)"
    assert bench.bar("layer", 1.0, "diffusers'", [0.2, 1.01]) == "bar: layer <= 1 x diffusers': 1.01 (missed)"


def test_a_count_of_nothing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(bench.main, ["--repeats", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
