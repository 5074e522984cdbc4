"""The overlays of configs/train: each builds and trains over the toybox's configuration, and changes what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.settings import load_settings
from tests.train.data.scene_shards import write_scene_shards
from tests.train.tiny_start import batch_of, start_settings, write_tiny_start
from train.draws import SampleDraws
from train.engine.optimizers import build_optimizer
from train.settings import REPOSITORY, TrainSettings
from train.tasks.subject import SubjectTask

CONFIGS = REPOSITORY / "configs" / "train"
ABLATIONS = sorted(path.stem for path in (CONFIGS / "ablations").iterdir())
ON_THE_TOYBOX = ("data.toybox.weight=1", "data.shards.laion.weight=0")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_start(tmp_path_factory.mktemp("start"))


def trained(settings: TrainSettings) -> SubjectTask:
    """Two optimiser steps of the task; the losses are finite."""
    task = SubjectTask(settings, torch.device("cpu"))
    optimizer = build_optimizer(task.module, settings.optimizer)
    for step in range(2):
        numbers = range(4 * step, 4 * step + 4)
        loss, _ = task.module(batch_of(task, numbers), SampleDraws(0, step, numbers), step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.isfinite(loss)
    return task


def ablation(root: Path, name: str, *overrides: str) -> SubjectTask:
    return trained(start_settings(root, *overrides, files=(f"ablations/{name}.yaml",)))


def parts(task: SubjectTask) -> set[str]:
    """Of the adapter, those that hold parameters."""
    return {name.split(".")[0] for name, _ in task.model.adapter.named_parameters()}


def records(task: SubjectTask) -> bool:
    return any(getattr(p, "layer", None) for p in task.model.unet.attn_processors.values())


def test_a_is_the_full_model(root: Path) -> None:
    task = ablation(root, "a_full")
    assert parts(task) == {"concept", "grounding", "fusers", "location_convolution"} and records(task)
    assert task.settings.override == TrainSettings(task="subject", name="-", steps=1).override


def test_b_trains_on_the_openimages_shards_and_on_nothing_else(root: Path, tmp_path: Path) -> None:
    folder = write_scene_shards(tmp_path / "openimages")
    task = ablation(root, "b_openimages", f"data.shards.openimages.folder={folder}", f"data.scratch={tmp_path}",
                    "data.cache_scenes=0")  # fmt: skip
    keys = task.keys(task.collate([task.dataset[number] for number in range(8)]))
    assert all(not key.startswith("toybox/") for key in keys) and len(set(keys)) == 8


def test_c_has_no_location_mask(root: Path) -> None:
    assert "location_convolution" not in parts(ablation(root, "c_no_location"))


def test_d_has_tokens_that_do_not_know_their_box(root: Path) -> None:
    assert any("place" in name for name, _ in ablation(root, "a_full").model.adapter.named_parameters())
    task = ablation(root, "d_no_box")
    assert not any("place" in name for name, _ in task.model.adapter.named_parameters())
    inputs = batch_of(task, range(4)).inputs
    moved = type(inputs)(**{**vars(inputs), "boxes": inputs.boxes / 2})
    tokens = [task.model.adapter.condition(given, (4, 4)).tokens for given in (inputs, moved)]
    assert torch.equal(*tokens)


def test_e_has_neither_subject_tokens_nor_adapter_layers(root: Path) -> None:
    task = ablation(root, "e_no_adapter")
    assert parts(task) == {"concept", "location_convolution"}
    assert task.model.adapter.condition(batch_of(task, range(4)).inputs, (4, 4)).tokens.shape[1] == 0


def test_f_neither_supervises_nor_records_attention(root: Path, tmp_path: Path) -> None:
    task = ablation(root, "f_no_attention_loss")
    batch = batch_of(task, range(4))
    loss, metrics = task.module(batch, SampleDraws(0, 0, range(4)), 0)
    assert not records(task) and "attention" not in metrics and torch.equal(loss, metrics["denoising"])
    assert "attention_inside" not in task.validate(tmp_path / "grid.png")


def test_g_has_no_pooled_vector_in_the_prompt(root: Path) -> None:
    task = ablation(root, "g_no_cls")
    assert "concept" not in parts(task)
    inputs = batch_of(task, range(4)).inputs
    other = type(inputs)(**{**vars(inputs), "pooled": inputs.pooled + 1})
    contexts = [task.model.encode(given, (4, 4))[0] for given in (inputs, other)]
    assert torch.equal(*contexts)


def test_instantbooth_fuses_after_the_text_encoder_and_trains_adapters_and_projections_at_their_rates(
    root: Path,
) -> None:
    settings = start_settings(root, *ON_THE_TOYBOX, "batch_size=4", files=("instantbooth.yaml",))
    before = SubjectTask(settings, torch.device("cpu")).model.state_dict()
    task = trained(settings)
    config = task.model.adapter.config
    assert (config["fusion"], config["fusion_scale"], config["zero_start"]) == ("after", 0.4, "gates")
    assert parts(task) == {"concept", "grounding", "fusers"} and not records(task)
    changed = {name.split(".")[0] for name, value in task.model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"adapter"} and all(name.startswith("adapter.") for name in task.trained)
    rates = {
        group["name"]: group["initial_lr"] for group in build_optimizer(task.module, settings.optimizer).param_groups
    }
    assert rates == {r"adapter\.fusers\..*": pytest.approx(1e-6), "rest": pytest.approx(1e-4)}
    assert all(len(scene.scene.nouns) == 1 for scene in (task.dataset[number] for number in range(8)))


@pytest.mark.parametrize("size", ["sd15", "sd21"])
@pytest.mark.parametrize("overlay", [*(f"ablations/{name}" for name in ABLATIONS), "instantbooth"])
def test_every_overlay_fits_the_published_recipes_and_gets_a_run_of_its_own(size: str, overlay: str) -> None:
    base = load_settings(TrainSettings, [CONFIGS / f"{size}.yaml"], [])
    settings = load_settings(TrainSettings, [CONFIGS / f"{size}.yaml", CONFIGS / f"{overlay}.yaml"], [])
    assert settings.name != base.name and settings.model == base.model
    used = {name: source for name, source in settings.data.shards.items() if source.weight}
    assert list(used) == (["openimages"] if overlay.endswith("b_openimages") else ["laion"])
    if overlay == "instantbooth":
        filters = used["laion"].filters
        assert (filters.min_area, filters.max_area, settings.data.max_subjects, settings.batch_size) == (
            0.1,
            0.7,
            1,
            16,
        )


def test_instantbooth_over_the_toybox_alone_says_that_its_shards_are_missing(root: Path) -> None:
    with pytest.raises(UserError, match="data.shards.laion"):
        SubjectTask(start_settings(root, files=("instantbooth.yaml",)), torch.device("cpu"))
