"""The dry run counts what torch would allocate and compute, and says so on one page."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from data_pipeline.errors import UserError
from data_pipeline.settings import load_settings
from data_pipeline.shards.reader import STATS_SUFFIX
from data_pipeline.shards.shard_stats import ShardStats, stats_to_json
from tests.train.tiny_runs import SIZES
from train.engine.gpus import GPUS, find_gpu
from train.plan.dry_run import Plan, PlanOptions, add_arguments, options_of, plan, plan_json, plan_of, print_plan
from train.plan.measure import BOTH_PARTS, FusedAttention, KeptTensors, LivePeak, Measured, cuda_autocast, measure
from train.plan.memory import adam_bytes, memory_by_strategy
from train.plan.networks import build_networks, training_loss
from train.plan.text import plan_text
from train.settings import REPOSITORY, TrainSettings

GIB = 2**30


def settings_of(folder: Path, *changes: str, task: str = "subject") -> TrainSettings:
    """A tiny run; the model file holds every network."""
    sizes = folder / "sizes.yaml"
    sizes.write_text(yaml.safe_dump(SIZES))
    plain = [f"task={task}", "name=tiny", f"model={sizes}", "steps=100", "batch_size=4", "data.size=32"]
    return load_settings(TrainSettings, [], [*plain, *changes])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def measured(folder: Path) -> Measured:
    """Networks as `settings_of(folder)` builds them, in bf16."""
    return measure(settings_of(folder, "engine.precision=bf16"))


@pytest.fixture(scope="module")
def tiny(folder: Path, measured: Measured) -> Plan:
    return plan_of(settings_of(folder, "engine.precision=bf16"), PlanOptions(gpus=4), measured)


def kept_on(device: str, settings: TrainSettings, attention: Any) -> int:
    with torch.device(device), attention:
        networks = build_networks(settings)
        with KeptTensors(networks.trainable) as kept:
            training_loss(networks, settings, 2)
    return kept.bytes


def test_tensors_without_values_are_kept_as_real_ones_are(folder: Path) -> None:
    settings = settings_of(folder)
    plain = [kept_on(device, settings, sdpa_kernel(SDPBackend.MATH)) for device in ("meta", "cpu")]
    assert plain[0] == plain[1] > 0
    # The CPU has a fused kernel of its own, which keeps the same tensors; masks and seeds differ by a little.
    fused = kept_on("meta", settings, FusedAttention())
    assert fused == pytest.approx(kept_on("cpu", settings, nullcontext()), rel=0.02)
    assert fused < plain[0]


def test_a_chain_of_known_size_keeps_what_a_hand_count_says() -> None:
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    with KeptTensors(layers) as kept:
        layers(torch.zeros(3, 8))
    # The input (3, 8), what GELU reads (3, 16) and what it gives (3, 16); weights are not counted.
    assert kept.bytes == 4 * (3 * 8 + 3 * 16 + 3 * 16)


def test_one_pass_tells_what_is_kept_with_recomputation_and_without(folder: Path) -> None:
    settings = settings_of(folder)
    with torch.device("meta"), FusedAttention():
        networks = build_networks(settings)
        with KeptTensors(networks.trainable) as whole:
            training_loss(networks, settings, 2)
        assert whole.bytes_recomputing == whole.bytes
        networks.checkpoint_activations(BOTH_PARTS)
        with KeptTensors(networks.trainable) as both:
            training_loss(networks, settings, 2)
        with KeptTensors(networks.trainable) as few:
            networks.checkpoint_activations(BOTH_PARTS)  # inside the context, torch's own checkpoint does it
            training_loss(networks, settings, 2)
    assert both.bytes == whole.bytes
    assert both.bytes_recomputing == few.bytes < whole.bytes / 2


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_does_not_keep_probabilities(masked: bool) -> None:
    rows, heads, tokens, width = 2, 3, 64, 8
    holder = nn.Module()
    with torch.device("meta"):
        query, key, value = (
            torch.empty(rows, heads, tokens, width, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        mask = torch.zeros(rows, 1, 1, tokens, dtype=torch.bfloat16) if masked else None
        with FusedAttention(), KeptTensors(holder) as kept:
            functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    one = rows * heads * tokens * width * 2
    log_sum = rows * heads * tokens * 4
    of_mask = rows * tokens * 2 if masked else 0
    assert 4 * one + log_sum + of_mask <= kept.bytes < 4 * one + log_sum + of_mask + 64  # and the seeds of dropout


def test_autocast_of_fake_tensors_is_that_of_a_gpu() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.device("cuda"), cuda_autocast(torch.bfloat16):
        pictures = torch.zeros(1, 8, 4, 4)
        after = nn.Conv2d(8, 8, 3)(pictures)
        assert after.dtype == torch.bfloat16
        assert nn.GroupNorm(2, 8)(after).dtype == torch.float32  # on a CPU autocast leaves it in bf16
    assert not torch.is_autocast_enabled("cuda")


def test_the_work_area_is_what_lives_at_once() -> None:
    with torch.device("meta"), torch.no_grad(), LivePeak() as live:
        value = torch.empty(1000)
        for _ in range(5):
            value = value + 1  # the old one is let go
    assert live.peak == 2 * 4000


def test_states_of_adam_are_counted_as_torch_makes_them() -> None:
    network = nn.Sequential(nn.Linear(70, 80), nn.LayerNorm(80))
    network[1].weight.requires_grad_(False)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    network(torch.ones(2, 70)).square().sum().backward()
    optimizer.step()
    real = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
    assert adam_bytes(network, "adamw") == real


def test_8_bit_states_are_a_byte_each_but_in_small_tensors() -> None:
    network = nn.Linear(128, 64)  # 8192 weights, 64 biases
    assert adam_bytes(network, "adamw8bit") == 2 * (8192 + 4 * 8192 / 256) + 2 * 4 * 64


def test_each_stage_of_zero_shares_what_it_is_known_for(tiny: Plan) -> None:
    trained = sum(part.trained for part in tiny.parts)
    rows = {row.strategy: row for row in tiny.memory}
    assert rows["zero1"].optimizer == rows["zero2"].optimizer == 12 * trained / 4
    assert rows["zero1"].gradients == rows["ddp"].gradients == 4 * trained
    assert rows["zero2"].gradients == 4 * trained / 4
    assert rows["zero3"].parameters == rows["zero1"].parameters / 4
    assert rows["zero2_offload"].optimizer == rows["zero2_offload"].ema == 0
    assert rows["zero2_offload"].host == (12 + 4 + 4) * trained / 4  # weights and Adam, gradients, average
    assert rows["ddp"].ema == 4 * rows["zero1"].ema


def test_one_process_gains_nothing_from_sharing(folder: Path, measured: Measured) -> None:
    rows = {row.strategy: row for row in memory_by_strategy(settings_of(folder), measured, 1, recomputed=False)}
    assert rows["zero1"].gradients == rows["zero2"].gradients
    assert rows["ddp"].buffers == 0


def test_recomputed_activations_take_less_memory_and_more_work(folder: Path, measured: Measured) -> None:
    kept = plan_of(settings_of(folder), PlanOptions(), measured)
    again = plan_of(settings_of(folder, "engine.checkpoint_activations=[unet,text_encoder]"), PlanOptions(), measured)
    assert again.memory[0].activations.per_sample < kept.memory[0].activations.per_sample
    assert again.kept[0].activations == kept.memory[0].activations
    assert 0 < again.flops.recomputed <= again.flops.forward
    assert again.duration.hours > kept.duration.hours


def test_zero_holds_a_low_precision_copy_of_frozen_weights_beside_them(tiny: Plan) -> None:
    rows = {row.strategy: row for row in tiny.memory}
    # ddp holds them in low precision only: what it saves in weights comes back to ZeRO as copies that autocast makes.
    assert rows["ddp"].parameters < rows["zero1"].parameters
    assert rows["ddp"].activations.fixed < rows["zero1"].activations.fixed
    assert rows["ddp"].activations.per_sample == rows["zero1"].activations.per_sample


def test_the_largest_batch_is_the_last_that_fits(tiny: Plan) -> None:
    row = tiny.memory[0]
    batch = row.largest_batch(2 * GIB)
    assert row.total(batch) <= 2 * GIB < row.total(batch + 1)
    assert row.largest_batch(1) == 0


def test_forward_and_backward_work_of_frozen_and_trained_layers_is_told_apart(folder: Path, measured: Measured) -> None:
    everything = measure(settings_of(folder, "override.trained=['.*']"))
    assert everything.forward_flops == measured.forward_flops
    # Trained layers need the products for their weights and for their input; frozen ones only the second.
    assert measured.forward_flops < measured.backward_flops < everything.backward_flops <= 2 * everything.forward_flops


def test_hours_follow_from_work_peak_and_share(folder: Path, measured: Measured) -> None:
    options = PlanOptions(gpus=2, gpu="h100", share_of_peak=0.5, price=3)
    found = plan_of(settings_of(folder, "engine.precision=bf16"), options, measured)
    samples = 100 * 4 * 2
    seconds = samples * found.flops.total / (2 * 0.5 * 989.4e12)
    assert found.duration.hours == pytest.approx(seconds / 3600)
    assert found.duration.dollars == pytest.approx(seconds / 3600 * 2 * 3)


def test_cached_features_take_the_frozen_networks_out_of_the_step(folder: Path, measured: Measured) -> None:
    live = plan_of(settings_of(folder), PlanOptions(), measured)
    cached = plan_of(settings_of(folder, "data.cache_scenes=100"), PlanOptions(), measured)
    assert live.flops.autoencoder > 0 < live.flops.image_tower
    assert cached.flops.autoencoder == cached.flops.image_tower == 0
    assert cached.memory[0].frozen < live.memory[0].frozen


@pytest.mark.parametrize(
    "adapter", ["{patch_tokens: false, location: false}", "{patch_places: true, only_inside_box: true}"]
)
def test_ablations_are_built_and_run(folder: Path, adapter: str) -> None:
    settings = settings_of(folder, f"override.adapter={adapter}", "diffusion.attention_loss_weight=0")
    with torch.device("meta"):
        training_loss(build_networks(settings), settings, 2).backward()


def test_the_base_is_planned_too(folder: Path) -> None:
    base = plan(settings_of(folder, task="base"), PlanOptions(gpus=1))
    assert all(part.trained == part.total for part in base.parts if part.part != "autoencoder")
    assert base.flops.image_tower == 0


def test_the_page_is_narrow_and_calls_itself_an_estimate(tiny: Plan) -> None:
    page = plan_text(tiny)
    assert max(len(line) for line in page.splitlines()) < 100
    assert "estimate" in page.splitlines()[0]
    assert all(f"  {strategy} " in page for strategy in ("ddp", "zero1", "zero2", "zero3", "zero2_offload"))
    assert "shards" not in page


def test_json_holds_the_same_numbers(tiny: Plan) -> None:
    values = json.loads(json.dumps(plan_json(tiny)))
    assert values["estimate"] is True
    assert values["duration"]["hours"] == tiny.duration.hours
    assert values["memory_bytes"]["kept"][0]["total"] == tiny.kept[0].total(4)


def test_a_folder_of_shards_that_is_not_there_does_not_stop_it(folder: Path, measured: Measured) -> None:
    found = plan_of(settings_of(folder, "data.shards.laion.folder=/nowhere/at/all"), PlanOptions(), measured)
    assert found.stored_samples == {"laion": None}
    assert "shards not here" in plan_text(found)


def test_local_shards_say_how_often_they_are_seen(folder: Path, measured: Measured, tmp_path: Path) -> None:
    for number in range(2):
        stats = ShardStats(f"{number:05d}", read=30, kept=25, dropped={}, entities=0, nouns={}, files={})
        (tmp_path / f"{number:05d}{STATS_SUFFIX}").write_text(stats_to_json(stats))
    found = plan_of(settings_of(folder, f"data.shards.mine.folder={tmp_path}"), PlanOptions(gpus=1), measured)
    assert found.stored_samples == {"mine": 50}
    assert "8.00 times over 50 samples" in plan_text(found)  # 100 steps of 4


@pytest.mark.parametrize(
    ("options", "told"),
    [({"gpu": "p100"}, "--gpu p100"), ({"gpus": 0}, "--gpus 0"), ({"share_of_peak": 30}, "--mfu 30")],
)
def test_arguments_that_make_no_sense_are_one_line(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        plan(settings_of(tmp_path), PlanOptions(**options))


def test_tasks_without_a_plan_say_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task=vae: --dry-run plans the tasks base and subject"):
        plan(settings_of(tmp_path, task="vae"), PlanOptions())


def test_a_gpu_is_found_by_what_its_driver_calls_it() -> None:
    assert find_gpu("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert find_gpu("NVIDIA A100-SXM4-40GB") is GPUS["a100-40gb"]
    assert find_gpu("NVIDIA GeForce RTX 4090") is GPUS["rtx4090"]
    assert find_gpu("NVIDIA H200") is GPUS["h200"]


def test_the_command_line_gives_the_options() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = options_of(parser.parse_args(["--dry-run", "--gpus", "2", "--gpu", "rtx4090", "--mfu", "0.4", "--json"]))
    assert options == PlanOptions(gpus=2, gpu="rtx4090", share_of_peak=0.4, as_json=True)
    assert options_of(parser.parse_args([])) == PlanOptions()


@pytest.mark.slow
@pytest.mark.parametrize(("config", "millions"), [("sd15", 860), ("sd21", 866)])
def test_the_recipes_of_stable_diffusion_are_planned_at_full_size(
    config: str, millions: int, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = load_settings(TrainSettings, [REPOSITORY / f"configs/train/{config}.yaml"], [])
    print_plan(settings, PlanOptions(gpus=32, as_json=True))
    values = json.loads(capsys.readouterr().out)
    counts = {part["part"]: part["total"] for part in values["parameters"]}
    assert sum(count for part, count in counts.items() if part.startswith("unet")) / 1e6 == pytest.approx(
        millions, abs=1
    )
    assert counts["autoencoder"] == 83_653_863
    assert values["samples_a_step"] == 256
