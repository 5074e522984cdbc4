"""Tasks subject and base on a Stable Diffusion folder: what a step draws, what the engine changes, what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from data_pipeline.errors import UserError
from infer.loading import load_trained_parts
from model.saving import load_subject_model
from tests.train.tiny_start import batch_of, start_settings, write_tiny_start
from train.denoising import by_band, even_timesteps, noised_at
from train.draws import SampleDraws
from train.network_options import compile_blocks
from train.settings import TrainSettings
from train.starting_models import noise_schedule
from train.tasks.base import BaseTask
from train.tasks.subject import SubjectTask
from train.validation_grid import TILE, attention_by_mask, attention_overview, subject_tiles, write_grid

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def task(root: Path) -> SubjectTask:
    task = SubjectTask(start_settings(root), CPU)
    wake(task.module)
    return task


def wake(module: nn.Module) -> None:
    """Away from the zeros that the adapter starts with."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def gradients(task: SubjectTask | BaseTask, parts: list[range], step: int = 3, **options: Any) -> dict[str, Tensor]:
    """Of the mean loss over the parts, with the loss itself as `loss`."""
    task.module.zero_grad()
    total = torch.zeros(())
    for numbers in parts:
        batch = batch_of(task, numbers)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.get("autocast", False)):
            loss, _ = task.module(batch, SampleDraws(0, step, numbers), step)
        (loss / len(parts)).backward()
        total += loss.detach() / len(parts)
    return {"loss": total} | {n: p.grad.clone() for n, p in task.module.named_parameters() if p.grad is not None}


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=tolerance, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# --- what a step draws


@pytest.mark.parametrize("step", range(4))  # with other numbers of references
def test_a_step_is_the_same_whether_one_process_takes_all_samples_or_two_share_them(
    task: SubjectTask, step: int
) -> None:
    assert_equal(gradients(task, [range(0, 8)], step), gradients(task, [range(0, 4), range(4, 8)], step))


@pytest.mark.parametrize("kind", [SubjectTask, BaseTask])
def test_errors_inside_masks_weigh_as_much_as_is_asked(root: Path, kind: type[SubjectTask | BaseTask]) -> None:
    name = "subject" if kind is SubjectTask else "base"
    losses = []
    for weight in (1, 4, 7):
        task = kind(start_settings(root, f"diffusion.mask_weight={weight}", task=name), CPU)
        losses.append(float(gradients(task, [range(0, 4)])["loss"]))
    once, four, seven = losses
    assert four > once and seven - once == pytest.approx(2 * (four - once), rel=1e-4)


def test_another_step_draws_other_noise(task: SubjectTask) -> None:
    batch = batch_of(task, range(4))
    losses = [
        float(task.module(batch, SampleDraws(0, 0, numbers), 0)[0].detach()) for numbers in (range(4), range(4, 8))
    ]
    assert losses[0] != losses[1]


def test_every_trained_parameter_takes_part_even_where_all_conditions_are_dropped(root: Path) -> None:
    task = SubjectTask(start_settings(root, "diffusion.drop_all=1", "diffusion.drop_text=0",
                                      "diffusion.drop_location=0", "diffusion.drop_subjects=0"), CPU)  # fmt: skip
    found = gradients(task, [range(0, 4)])
    assert {n for n, p in task.module.named_parameters() if p.requires_grad} == found.keys() - {"loss"}


def test_the_parameters_names_are_those_that_patterns_match(task: SubjectTask) -> None:
    trained = [name for name, parameter in task.module.named_parameters() if parameter.requires_grad]
    assert not any(name.startswith("model.") for name in task.module.state_dict())
    assert trained == task.trained and {name.split(".")[0] for name in trained} == {"unet", "text_encoder", "adapter"}


# --- what is told


def test_the_error_is_told_by_equal_ranges_of_timesteps_and_nan_where_none_fell() -> None:
    errors, timesteps = torch.tensor([1.0, 2.0, 6.0, 4.0]), torch.tensor([0, 249, 250, 999])
    found = {name: float(value) for name, value in by_band("e", errors, timesteps, 1000, 4).items()}
    assert found["e_t0"] == 1.5 and found["e_t1"] == 6.0 and found["e_t3"] == 4.0 and np.isnan(found["e_t2"])


def test_a_step_tells_the_unweighted_error_by_band_and_the_attention_of_rows_with_subjects(task: SubjectTask) -> None:
    batch = batch_of(task, range(8))
    _, metrics = task.module(batch, SampleDraws(0, 0, range(8)), 0)
    assert set(metrics) == {"denoising", "attention", *(f"denoising_t{band}" for band in range(4))}
    assert all(value.dtype == torch.float32 and value.dim() == 0 for value in metrics.values())
    none = SubjectTask(start_settings(task_root(task), "diffusion.drop_all=1", "diffusion.drop_text=0",
                                      "diffusion.drop_location=0", "diffusion.drop_subjects=0"), CPU)  # fmt: skip
    assert none.module(batch, SampleDraws(0, 0, range(8)), 0)[1]["attention"].isnan()


def task_root(task: SubjectTask) -> Path:
    return task.settings.model.parent


def test_the_noise_of_a_validation_sample_is_that_of_its_number_and_timesteps_are_spread_evenly() -> None:
    schedule, latents = DDPMScheduler(), torch.zeros(4, 1, 2, 2)
    assert even_timesteps(schedule, 0, 4, 4).tolist() == [125, 375, 625, 875]
    whole = noised_at(schedule, latents, even_timesteps(schedule, 0, 4, 4), 0)
    half = noised_at(schedule, latents[:2], even_timesteps(schedule, 2, 2, 4), 2)
    assert torch.equal(whole.noise[2:], half.noise) and torch.equal(whole.noisy[2:], half.noisy)
    assert not torch.equal(whole.noise[0], whole.noise[1])


def test_validation_draws_every_sample_with_its_subjects_tiles_and_measures_the_same_twice(
    task: SubjectTask, tmp_path: Path
) -> None:
    first, again = (task.validate(tmp_path / name) for name in ("a.png", "b.png"))
    bands = {f"loss_t{band}" for band in range(4)}
    assert first.keys() == {"loss", "loss_without_subjects", "gain", "attention_inside", "attention_outside", *bands}
    assert first == again and np.isfinite(list(first.values())).all()
    assert first["gain"] == first["loss_without_subjects"] - first["loss"] != 0
    picture = Image.open(tmp_path / "a.png")
    assert picture.tobytes() == Image.open(tmp_path / "b.png").tobytes()
    assert picture.width > 2 * 4 * TILE and sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_attention_is_averaged_over_heads_and_layers_of_16_tokens_a_side_or_the_finest() -> None:
    layers = {"a": torch.full((1, 2, 1, 256), 0.2), "b": torch.full((1, 2, 1, 256), 0.4), "c": torch.ones(1, 2, 1, 64)}
    assert attention_overview(layers).shape == (1, 1, 16, 16)
    assert attention_overview(layers).mean() == pytest.approx(0.3)
    assert attention_overview({"c": layers["c"], "d": torch.ones(1, 2, 1, 16)}).shape == (1, 1, 8, 8)


def test_attention_inside_and_outside_the_masks_counts_named_subjects_only() -> None:
    attention, masks = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 16, 16)
    attention[0, 0, :2], masks[0, 0, :8] = 0.5, 1.0  # the upper half
    attention[0, 0, 3, 3] = 0.8
    attention[0, 1] = 9.0  # of nobody
    inside, outside = attention_by_mask(attention, masks, torch.tensor([[True, False]]))
    assert inside == 0.5 and outside == pytest.approx(0.1)


def test_a_subjects_two_tiles_show_its_attention_and_its_mask_and_absent_subjects_stay_white() -> None:
    attention, masks = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 16, 16)
    attention[0, 0, 0, 0], masks[0, 0, :, 8:] = 0.01, 1.0
    tiles = subject_tiles(torch.ones(1, 3, 64, 64), attention, masks, torch.tensor([[True, False, False]]))[0]
    half = TILE // 2
    assert [tile.shape for tile in tiles] == [(3, TILE, TILE)] * 2 and (tiles[1] == 1).all()
    looked, mask = tiles[0][0, :half, :half], tiles[0][0, :half, half:]
    assert looked[0, 0] == 1 and looked[-1, -1] == pytest.approx(0.2) and mask[0, -1] == 1 and mask[0, 0] < 0.25
    assert (tiles[0][:, half:] == 1).all()


def test_pictures_of_any_size_become_tiles_of_one_size_and_samples_stand_two_a_line(tmp_path: Path) -> None:
    large, small = torch.zeros(3, 512, 512), torch.zeros(3, 8, 8)
    large[:, :, 256:], small[:, :, 4:] = 1.0, 1.0
    write_grid([[large], [small], [large]], ["one", "two", "three"], tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert TILE * 2 < grid.shape[0] < TILE * 2.5 and TILE * 2 < grid.shape[1] < TILE * 2.5
    first, second = grid[4 : 4 + TILE, 4 : 4 + TILE], grid[4 : 4 + TILE, 8 + TILE : 8 + 2 * TILE]
    assert (first == second).all() and first[0, TILE // 2 - 1, 0] == 0 and first[0, TILE // 2, 0] == 255


# --- what the engine changes: memory and speed, not results


def test_recomputed_activations_give_equal_gradients(root: Path, task: SubjectTask) -> None:
    other = SubjectTask(start_settings(root, "engine.checkpoint_activations=[unet, text_encoder]"), CPU)
    wake(other.module)
    runs = []
    layer = other.model.text_encoder.encoder.layers[0].mlp
    layer.register_forward_pre_hook(lambda *arguments: runs.append("text"))
    other.model.unet.down_blocks[0].resnets[0].register_forward_pre_hook(lambda *arguments: runs.append("unet"))
    assert_equal(gradients(task, [range(0, 4)]), gradients(other, [range(0, 4)]))
    assert sorted(runs) == ["text", "text", "unet", "unet"]  # each once more for backward


def test_frozen_weights_in_low_precision_change_nothing_and_take_half_the_memory(root: Path) -> None:
    settings = start_settings(root)
    low = SubjectTask(start_settings(root, "engine.precision=bf16"), CPU)
    full = SubjectTask(settings, CPU)
    for one in (low, full):
        wake(one.module)
    assert_equal(gradients(full, [range(0, 4)], autocast=True), gradients(low, [range(0, 4)], autocast=True), 0)
    kept = [sum(p.numel() * p.element_size() for p in t.model.unet.parameters() if not p.requires_grad)
            for t in (full, low)]  # fmt: skip
    assert kept[1] < 0.55 * kept[0]  # norms and biases stay
    assert all(p.dtype == torch.float32 for p in low.module.parameters() if p.requires_grad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's fused attention is fast in bf16")
def test_on_a_cpu_attention_is_fused_in_float32_and_plain_in_bf16(root: Path) -> None:
    states = torch.randn(2, 2, 4, 8, dtype=torch.bfloat16, requires_grad=True)
    outs = []
    for precision in ("bf16", "no"):
        SubjectTask(start_settings(root, f"engine.precision={precision}"), CPU)
        outs.append(functional.scaled_dot_product_attention(states, states, states))
    assert ["Flash" in type(out.grad_fn).__name__ for out in outs] == [False, True]
    torch.testing.assert_close(*outs, atol=0.02, rtol=0.02)


def test_a_module_cast_as_a_whole_takes_float32_batches_and_gives_float32_losses(root: Path) -> None:
    task = SubjectTask(start_settings(root), CPU)
    task.module.to(torch.bfloat16)
    loss, metrics = task.module(batch_of(task, range(4)), SampleDraws(0, 0, range(4)), 0)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and metrics["denoising"].dtype == torch.float32


def test_under_autocast_image_tokens_leave_the_adapter_in_low_precision_as_they_came(task: SubjectTask) -> None:
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    fuser = next(iter(task.model.adapter.fusers.values()))
    handle = fuser.register_forward_hook(lambda module, given, x: seen.append((given[0].dtype, x.dtype)))
    gradients(task, [range(0, 4)], autocast=True)
    handle.remove()
    assert seen == [(torch.bfloat16, torch.bfloat16)]


@pytest.mark.slow
def test_compiled_blocks_give_equal_gradients_and_stay_within_the_limit_of_graphs(
    root: Path, task: SubjectTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SubjectTask(start_settings(root), CPU)
    wake(other.module)
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        monkeypatch.setattr(torch._dynamo.config, name, getattr(torch._dynamo.config, name))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    compile_blocks(other.model.unet, backend="eager")  # graphs are captured as for inductor, which takes minutes here
    for step in range(3):  # other numbers of references
        parts = [range(4 * step, 4 * step + 4)]
        assert_equal(gradients(task, parts, step), gradients(other, parts, step), 1e-5)


# --- what a run stands on


def test_pndm_and_v_prediction_train_by_the_noise_levels_and_the_target_of_the_folder() -> None:
    pndm = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                         prediction_type="v_prediction")  # fmt: skip
    schedule = noise_schedule(pndm)
    assert torch.equal(schedule.alphas_cumprod, pndm.alphas_cumprod)
    assert schedule.config.prediction_type == "v_prediction" and hasattr(schedule, "get_velocity")
    with pytest.raises(UserError, match="FlowMatchEulerDiscreteScheduler: has no beta schedule"):
        noise_schedule(FlowMatchEulerDiscreteScheduler())


def test_the_base_is_that_of_inputs_or_else_of_the_model_file_and_is_named_so_in_the_export(root: Path) -> None:
    assert SubjectTask(start_settings(root), CPU).base == str(root / "sd")
    (root / "other").symlink_to(root / "sd")
    assert SubjectTask(start_settings(root, f"inputs.base={root / 'other'}"), CPU).base == str((root / "sd").resolve())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "inputs.base=nowhere",
            "inputs.base=nowhere: no run's export in .*/runs/nowhere/export; base nowhere: no such",
        ),
        ("inputs.base={root}/encoder", "inputs.base=.*/encoder: .*base .*/encoder: cannot be loaded"),
        ("inputs.clip=nowhere", "inputs.clip: neither .*/runs/nowhere/export nor the folder nowhere exists; train it"),
        ("inputs.clip={root}/sd", "inputs.clip=.*/sd: cannot be loaded"),
        ("override.adapter={levels: [down_blocks.7]}", "sizes.yaml: levels: 'down_blocks.7' holds no cross-attention"),
        ("override.adapter={gates: 1}", "sizes.yaml: .*unexpected keyword argument 'gates'"),
        ("override.trained=['unet.nothing']", "sizes.yaml: trained: 'unet.nothing' matches no parameter"),
        ("options={steps: 3}", "options: unknown key steps; did you mean validation_steps"),
    ],
)
def test_what_cannot_be_started_from_is_refused_in_one_line(root: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        SubjectTask(start_settings(root, override.replace("{root}", str(root))), CPU)
    assert "\n" not in str(raised.value)


def test_a_base_goes_on_from_another_or_starts_with_a_vae_but_not_both(root: Path) -> None:
    told = start_settings(root, "inputs={base: start, vae: mine}", task="base")
    with pytest.raises(UserError, match=r"inputs.vae=mine, inputs.base=start: .* give a configuration with one of"):
        BaseTask(told, CPU)


@pytest.fixture(scope="module")
def earlier(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a subject model that has learnt something."""
    task, folder = SubjectTask(start_settings(root), CPU), tmp_path_factory.mktemp("earlier")
    wake(task.module)
    task.export(folder)
    return folder


def test_a_run_goes_on_from_another_subject_model_and_its_image_encoder(root: Path, earlier: Path) -> None:
    settings = start_settings(root, f"inputs.subject={earlier}")
    alone = settings.model_copy(update={"inputs": {"subject": str(earlier)}})
    for task in (SubjectTask(settings, CPU), SubjectTask(alone, CPU)):
        weights = dict(task.module.named_parameters())
        known = load_subject_model(earlier)
        before = known.trained | {f"adapter.{name}": value for name, value in known.adapter.named_parameters()}
        assert before.keys() <= {name for name, weight in weights.items() if weight.requires_grad}
        assert all(torch.equal(weights[name], value) for name, value in before.items())
    fresh = SubjectTask(start_settings(root), CPU).module
    assert not all(torch.equal(weight, weights[name]) for name, weight in fresh.named_parameters())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("override.adapter={levels: all}", "override.adapter: levels: the adapter is that of inputs.subject="),
        ("override.trained=['adapter..*']", "inputs.subject=.*: it trained text_encoder.* add a pattern to `trained`"),
        ("inputs.subject={root}/sd", "inputs.subject=.*/sd: .*no subject_model.json"),
    ],
)
def test_another_subject_model_that_does_not_fit_is_one_line(
    root: Path, earlier: Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        SubjectTask(start_settings(root, f"inputs.subject={earlier}", override.replace("{root}", str(root))), CPU)
    assert "\n" not in str(raised.value)


def test_a_published_tower_that_cannot_be_had_is_one_line(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*arguments: object, **named: object) -> None:
        raise ConnectionError("Name or service\nnot known")

    monkeypatch.setattr("model.image_encoder.HfApi.model_info", unreachable)
    sizes = root / "published.yaml"
    sizes.write_text(f"base: {root / 'sd'}\nimage_encoder: {{name: ViT-H-14, pretrained: laion2b_s32b_b79k}}\n")
    settings = start_settings(root, f"model={sizes}").model_copy(update={"inputs": {}})
    with pytest.raises(UserError, match="image_encoder ViT-H-14 laion2b_s32b_b79k: cannot be loaded .Name or service"):
        SubjectTask(settings, CPU)


def test_the_export_of_a_low_precision_run_goes_on_the_base_of_full_precision(root: Path, tmp_path: Path) -> None:
    task = SubjectTask(start_settings(root, "engine.precision=bf16"), CPU)
    wake(task.module)
    assert np.isfinite(list(task.validate(tmp_path / "grid.png").values())).all()
    task.export(tmp_path)
    assert load_subject_model(tmp_path).fingerprint == task.fingerprint
    loaded = load_trained_parts(tmp_path, None, torch.float32)  # refuses a base with another fingerprint
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(loaded["unet"].get_parameter(name), task.model.unet.get_parameter(name))


# --- task base


def test_the_base_goes_on_from_a_folder_and_is_exported_as_one(root: Path, tmp_path: Path) -> None:
    task = BaseTask(start_settings(root, task="base"), CPU)
    assert all(parameter.requires_grad for parameter in task.module.parameters())
    whole, halves = gradients(task, [range(0, 4)]), gradients(task, [range(0, 2), range(2, 4)])
    assert_equal(whole, halves)
    assert task.validate(tmp_path / "grid.png").keys() == {"loss", *(f"loss_t{band}" for band in range(4))}
    task.export(tmp_path / "export")
    assert AutoencoderKL.from_pretrained(tmp_path / "export" / "vae").config.sample_size == 32
    settings: TrainSettings = start_settings(root, f"inputs.base={tmp_path / 'export'}", task="base")
    assert BaseTask(settings, CPU).start.scheduler.config._class_name == "PNDMScheduler"
