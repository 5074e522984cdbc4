"""scripts/bench_train.py: what it compares is the same work, its counts are right, its bars are judged as they say."""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import run_command
from data_pipeline.settings import load_settings
from model.attention_maps import RecordingAttnProcessor, supervised_layers
from scripts import bench_train
from scripts.bench_train_parts import attention, gpu, trainer
from scripts.bench_train_parts.turns import Bar, Table, median_seconds
from tests.train.tiny_runs import SIZES
from tests.train.tiny_start import write_tiny_start
from train.settings import TrainSettings

CPU = torch.device("cpu")
UNET = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
EVERY_LAYER = 3  # self-attention, adapter, cross-attention of a block


@pytest.fixture
def step() -> attention.UNetStep:
    """One transformer block in each of three supervised groups."""
    return attention.make_step(
        UNET, SIZES["trained"], subjects=2, patches=4, patch_width=12, device=CPU, dtype=torch.float32
    )


# --- turns and bars


def test_every_work_is_called_once_before_the_clock_and_then_takes_turns() -> None:
    called: list[str] = []
    works = {name: partial(called.append, name) for name in "ab"}
    seconds = median_seconds(works, rounds=2, device=CPU, between=lambda: called.append("|"))
    assert "".join(called) == "b|a|" + "a|b|" + "b|a|"
    assert list(seconds) == ["a", "b"] and seconds["a"].wall > 0


@pytest.mark.parametrize(
    ("value", "at_least", "met"), [(1.1504, False, True), (1.16, False, False), (0.31, True, True)]
)
def test_a_bar_is_judged_to_the_thousandth(value: float, at_least: bool, met: bool) -> None:
    bar = Bar("x", value, 0.3 if at_least else 1.15, at_least)
    assert bar.met == met
    assert str(bar).endswith("(met)" if met else "(MISSED)")


# --- attention


def test_our_supervised_step_and_whole_maps_give_the_same_loss_and_gradients(step: attention.UNetStep) -> None:
    everything = attention.attentions_of_supervised_groups(step)
    for each in (step, attention.SupervisedGroups.of(step)):
        assert attention.largest_difference(each, everything) < 1e-4


def test_another_supervised_token_would_be_noticed(step: attention.UNetStep, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = attention.ours

    def moved(step: attention.UNetStep, weight: float) -> torch.Tensor:
        step.weights.copy_(step.weights.roll(1, dims=2))
        loss = ours(step, weight)
        step.weights.copy_(step.weights.roll(-1, dims=2))
        return loss

    monkeypatch.setattr(attention, "ours", moved)
    assert attention.largest_difference(step, attention.attentions_of_supervised_groups(step)) > 1e-2


def test_all_three_attentions_of_every_supervised_block_run_unfused(step: attention.UNetStep) -> None:
    names = attention.attentions_of_supervised_groups(step)
    assert len(names) == EVERY_LAYER * len(supervised_layers(step.unet))
    with attention.whole_maps(step, names) as kept:
        step.output_loss()
    assert set(kept) == set(names)
    for probabilities in kept.values():
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:-1]))


def test_afterwards_the_network_is_fused_again(step: attention.UNetStep) -> None:
    before = attention.without_map_loss(step)
    names = attention.attentions_of_supervised_groups(step)
    with attention.whole_maps(step, names) as kept:
        pass
    torch.testing.assert_close(attention.without_map_loss(step), before, atol=0, rtol=0)
    assert not kept
    processors = {type(processor) for processor in step.unet.attn_processors.values()}
    assert processors == {RecordingAttnProcessor}


def test_whole_maps_keep_their_own_size_more_for_the_backward_pass(step: attention.UNetStep) -> None:
    fused = attention.kept_bytes(step, partial(attention.without_map_loss, step))
    name = next(name for name in attention.attentions_of_supervised_groups(step) if name.endswith(".fuser"))
    with attention.whole_maps(step, [name]) as kept:
        step.output_loss()
    unfused = attention.kept_bytes(step, partial(attention.with_whole_maps, step, supervised_layers(step.unet)))
    assert kept[name].shape == (1, 2, 16, 16 + 8)  # heads, image tokens, and those of two subjects
    assert unfused > fused


def test_the_groups_alone_are_given_what_they_get_in_the_whole_unet(step: attention.UNetStep) -> None:
    groups = attention.SupervisedGroups.of(step)
    recorders = [attention.AttentionMapRecorder(step.weights) for _ in range(2)]
    step.output_loss(recorder=recorders[0])
    groups.output_loss(recorder=recorders[1])
    assert list(recorders[0].maps) == list(recorders[1].maps) == supervised_layers(step.unet)
    for name, maps in recorders[0].maps.items():
        torch.testing.assert_close(recorders[1].maps[name], maps)


# --- trainer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Changes that make the toybox run a tiny one."""
    root = write_tiny_start(tmp_path_factory.mktemp("start"))
    return {
        "model": str(root / "sizes.yaml"),
        "inputs": {"clip": str(root / "encoder")},
        "batch_size": 2,
        "data.size": 32,
        "options": {"validation_steps": 2},
    }


def test_the_loop_and_the_bare_one_see_the_same_batches(tiny: dict[str, object], tmp_path: Path) -> None:
    settings = trainer.toybox_settings(tmp_path, {**tiny, "data.cache_scenes": 16})
    for run in (trainer.run_loop, trainer.run_bare):
        windows = run(settings)
        assert min(windows.seconds) > 0 and min(windows.processor) > 0
        assert {len(windows.seconds), len(windows.processor), len(windows.waiting)} == {trainer.WINDOWS - 1}
    assert not (settings.folder / "validation").exists() and not (settings.folder / "export").exists()


def test_overhead_is_the_trainers_time_beyond_the_bare_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "run_loop", lambda settings: trainer.Windows([1.1, 1.0], [1.2, 1.2], [0.01, 0.03]))
    monkeypatch.setattr(trainer, "run_bare", lambda settings: trainer.Windows([1.0, 1.0], [1.0, 1.0], [0.0, 0.0]))
    (table,) = trainer.bench_overhead(argparse.Namespace(rounds=2))
    assert table.bars[0].value == pytest.approx(0.05) and table.bars[0].met
    assert table.rows["trainer"]["data wait %"] == pytest.approx(2)
    assert table.rows["trainer"]["CPU ratio"] == pytest.approx(1.2)


def test_precisions_are_run_as_told_and_compared_by_images_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"no": 1.0, "bf16": 0.8}
    monkeypatch.setattr(
        trainer, "run_loop", lambda settings: trainer.Windows([seconds[settings.engine.precision]], [1.0], [0.0])
    )
    (table,) = trainer.bench_precision(argparse.Namespace(rounds=2))
    assert [row["times float32"] for row in table.rows.values()] == pytest.approx([1.0, 1.25])


@pytest.mark.slow
def test_live_scenes_and_shards_are_run_and_their_waiting_is_read(tiny: dict[str, object]) -> None:
    (table,) = trainer.bench_wait(argparse.Namespace(rounds=1), tiny)
    assert list(table.rows) == ["toybox scenes", "shards"]
    assert [bar.value * 100 for bar in table.bars] == [row["data wait %"] for row in table.rows.values()]
    assert all(0 <= bar.value <= 1 for bar in table.bars)


# --- gpu, at tiny size on whatever device there is


@pytest.fixture
def tiny_gpu(tmp_path: Path) -> TrainSettings:
    file = tmp_path / "sizes.yaml"
    file.write_text(json.dumps(SIZES))
    values = gpu.gpu_settings(subjects=2).model_dump(mode="json")
    values |= {"model": str(file), "data": values["data"] | {"size": 32}}
    values["engine"] |= {"precision": "no", "compile": False}
    return load_settings(TrainSettings, [], [f"{key}={json.dumps(value)}" for key, value in values.items()])


def test_a_gpu_table_has_figures_for_every_way_and_batch_size(tiny_gpu: TrainSettings) -> None:
    one, two, best = gpu.measure_sizes(tiny_gpu, (1, 2), rounds=1)
    for size, table in enumerate((one, two), start=1):
        assert list(table.rows) == ["eager", "eager, no attention loss"]
        for row in table.rows.values():
            assert row["images/s"] * row["ms a step"] / 1000 == pytest.approx(size)
            assert row["memory GB"] > 0
    assert not best.rows and (best.bars or "not known" in best.shapes)


def test_flops_of_a_step_grow_with_the_batch_and_every_trained_weight_gets_a_gradient(
    tiny_gpu: TrainSettings,
) -> None:
    step = gpu.SubjectStep.of(tiny_gpu)
    before = {name: p.detach().clone() for name, p in step.training.named_parameters() if p.requires_grad}
    one, four = (step.count_flops(step.random_batch(size)) for size in (1, 4))
    assert one < four <= 4 * one
    moved = [name for name, p in step.training.named_parameters() if p.requires_grad and not p.equal(before[name])]
    assert len(moved) > 0.9 * len(before)


def test_the_attention_loss_is_left_out_where_that_is_asked(tiny_gpu: TrainSettings) -> None:
    step = gpu.SubjectStep.of(tiny_gpu)
    with step.without_attention_loss():
        assert step.training.settings.attention_loss_weight == 0
    assert step.training.settings.attention_loss_weight == 0.01


# --- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what is missing without a GPU")
@pytest.mark.parametrize("arguments", [["--only", "gpu"], ["--only", "attention", "--device", "cuda"]])
def test_without_a_gpu_one_line_tells_so(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(bench_train.main, arguments) == 2
    assert capsys.readouterr().err == (
        "error: bench_train: torch finds no GPU here; leave out --device cuda and --only gpu\n"
    )


def test_figures_and_verdicts_are_written_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table("overhead", "tiny", {"a": {"seconds": 1.0}}, (Bar("a", 0.06, 0.05),))
    monkeypatch.setattr(trainer, "bench_overhead", lambda options: iter([table]))
    assert bench_train.main(["--only", "overhead", "--json", str(tmp_path / "out.json")]) == 0
    assert "bar: a <= 0.05: 0.060 (MISSED)" in capsys.readouterr().out
    (read,) = json.loads((tmp_path / "out.json").read_text())["tables"]
    assert read["rows"] == {"a": {"seconds": 1.0}} and read["bars"][0]["met"] is False
