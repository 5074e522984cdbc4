"""scripts/bench_refine.py: what it compares does the same work, and its figures are those of the steps it counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel

from infer.refine.task import method_settings
from scripts import bench_refine as bench
from tests.model.tiny import tiny_text_encoder, tiny_unet


@pytest.fixture(scope="module")
def work() -> bench.LayerWork:
    text_encoder: CLIPTextModel = tiny_text_encoder()
    return bench.layer_work(text_encoder.eval().requires_grad_(False), tiny_unet(), batch=2, words_used=5)


@torch.no_grad()
def test_with_the_word_out_of_play_exact_mode_is_the_plain_text_encoder(work: bench.LayerWork) -> None:
    contexts = replace(work.contexts, static=work.contexts.static * 0)
    assert contexts.adaptive is not None
    whole = replace(contexts, adaptive=replace(contexts.adaptive, weight=torch.ones(2, 1, 1)))
    start = contexts.adaptive.start
    assert start == bench.WORD_POSITION and work.layers(whole).shape == work.plain().shape
    rows = work.text_encoder.embeddings(input_ids=work.plain_ids)[:, start:]
    unplaced = replace(whole.adaptive, hidden=rows.expand(len(contexts.static), -1, -1, -1))
    nothing = replace(unplaced, places=tuple(place[:0] for place in unplaced.places), positions=rows[0, :0])
    found = work.layers(replace(whole, adaptive=nothing))
    torch.testing.assert_close(found[:, start:], work.plain()[:, start:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_fast_mode_encodes_all_layers_at_once_from_the_second_pass_on(work: bench.LayerWork) -> None:
    calls: list[int] = []
    hook = work.text_encoder.final_layer_norm.register_forward_hook(lambda *told: calls.append(len(told[2])))
    fast = replace(work.contexts, mode="fast", previous={})
    counts = []
    for contexts in (work.contexts, fast, fast):
        calls.clear()
        work.layers(contexts)
        counts.append(list(calls))
    hook.remove()
    layers = len(work.features)
    assert counts == [[2] * layers, [2] * layers, [2 * layers]]


def test_the_bare_loop_learns_what_refine_learns_and_both_count_the_same_steps(tmp_path: Path) -> None:
    settings = bench.refine_settings("textual-inversion", tmp_path, {"weight_decay": 0}, steps=5)
    assert method_settings(settings).steps == 5
    task = bench.tuned(settings)
    assert len(task.readings) == 5 and task.exported
    assert len(bench.steps_of_bare_loop(settings)) == len(bench._between(task.readings)) == 4 - bench.WARM_UP
    assert all(step.wall > 0 and step.processor > 0 for step in bench._between(task.readings))


def test_errors_are_those_of_one_picture_along_a_generation(tmp_path: Path) -> None:
    options = {"variation": {"flip": 0, "shrink": 0}, "warmup_steps": 0}
    task = bench.tuned(bench.refine_settings("lasr", tmp_path, options, steps=1))
    exact, again, fast = (bench.errors_on_the_way(task, mode, 0, 3) for mode in ("exact", "exact", "fast"))
    assert exact == again and fast[0] == pytest.approx(exact[0], rel=1e-5), "the first pass has none to look back at"
    assert fast[1:] != exact[1:] and len(exact) == 3
