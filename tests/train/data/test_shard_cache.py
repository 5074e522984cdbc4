"""`train cache`: written shard by shard, continued after a kill, refused where it does not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.shards.reader import read_shard
from data_pipeline.shards.removal import remove_samples
from data_pipeline.shards.writer import write_shard
from tests.data_pipeline.shards.small_shards import FACTS
from tests.train.data.frozen_models import base_run, encoders, save_frozen_models
from tests.train.data.scene_shards import data_of, rendered_sample, scene_shards, stream_of, write_scene_shards
from train import cache_command
from train.cache_command import build_cache, cache_shards, main
from train.data import shard_cache
from train.data.shard_cache import ShardCache, cache_facts
from train.engine.processes import Processes
from train.settings import DataSettings
from train.stream import SamplePlace


def built(data: DataSettings, folder: Path, processes: Processes | None = None) -> Path:
    cache_shards(data, encoders(), folder, processes or Processes())
    return folder


def opened(data: DataSettings, folder: Path, **models: int) -> ShardCache:
    return ShardCache(folder, stream_of(data), cache_facts(data, encoders(**models)), kept_open=1)


def all_scenes(data: DataSettings, folder: Path) -> dict[str, dict[str, Any]]:
    cache = opened(data, folder)
    places = [SamplePlace("pairs", shard, row, ()) for shard in ("00000", "00001") for row in range(40)]
    found = [cache.scene(place) for place in places]
    return {scene.key: vars(scene) for scene in found if scene is not None}


def assert_equal(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> None:
    assert first.keys() == second.keys() and len(first) > 0
    for key, values in first.items():
        for name, value in values.items():
            other = second[key][name]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSettings, Path]:
    folder = tmp_path_factory.mktemp("cache")
    data = data_of(scene_shards(), folder)
    return data, built(data, folder / "cache")


def test_every_sample_of_every_shard_is_in_it_by_its_row(cached: tuple[DataSettings, Path]) -> None:
    data, folder = cached
    scenes = all_scenes(data, folder)
    assert list(scenes) == [f"{n // 40:05d}/scene-{n:04d}" for n in range(80)]
    cache = opened(data, folder)
    for place in (SamplePlace("pairs", "00001", 7, ()), SamplePlace("pairs", "00000", 31, ())):
        scene = cache.scene(place)
        assert scene is not None and int(scene.key[-4:]) == 40 * int(place.shard) + place.row
        assert scene.latents.dtype == torch.half and scene.latent_std is not None and scene.latent_std.min() > 0


def test_processes_take_shards_in_turn(cached: tuple[DataSettings, Path], tmp_path: Path) -> None:
    data, alone = cached
    built(data, tmp_path / "c", Processes(0, 2))
    assert sorted(path.parent.name[:5] for path in (tmp_path / "c").rglob("index.json")) == ["00000"]
    built(data, tmp_path / "c", Processes(1, 2))
    assert_equal(all_scenes(data, tmp_path / "c"), all_scenes(data, alone))


def test_loading_processes_change_nothing(cached: tuple[DataSettings, Path], tmp_path: Path) -> None:
    data, alone = cached
    built(data.model_copy(update={"workers": 2}), tmp_path / "c")
    assert_equal(all_scenes(data, tmp_path / "c"), all_scenes(data, alone))


class Killed(BaseException):
    pass


def test_a_build_that_was_killed_goes_on_and_ends_as_an_undisturbed_one(
    cached: tuple[DataSettings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, alone = cached
    monkeypatch.setattr(shard_cache, "ROWS_A_FILE", 10)
    monkeypatch.setattr(cache_command, "ROWS_A_FILE", 10)
    real, written = cache_command.write_scenes, []

    def write_and_die(scenes: Any, path: Path, part: Path, facts: Any) -> None:
        if len(written) == 6:
            part.write_bytes(b"half a file")
            raise Killed
        written.append(path)
        real(scenes, path, part, facts)

    monkeypatch.setattr(cache_command, "write_scenes", write_and_die)
    with pytest.raises(Killed):
        built(data, tmp_path / "c")
    with pytest.raises(
        UserError, match="1 of 2 shards are missing; pairs/00001 is not in it; .*it adds what is missing"
    ):
        opened(data, tmp_path / "c")
    times = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(cache_command, "write_scenes", real)
    built(data, tmp_path / "c")
    assert {path: path.stat().st_mtime_ns for path in written} == times, "finished files are not written again"
    assert_equal(all_scenes(data, tmp_path / "c"), all_scenes_of(alone, data))


def all_scenes_of(folder: Path, data: DataSettings) -> dict[str, dict[str, Any]]:
    """Of a cache with files of the usual size, while another size is set."""
    shard_cache.ROWS_A_FILE, set_to = 500, shard_cache.ROWS_A_FILE
    try:
        return all_scenes(data, folder)
    finally:
        shard_cache.ROWS_A_FILE = set_to


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"size": 64}, r"another data.size \(32, now 64\)"),
        ({"max_subjects": 2}, r"another data.max_subjects \(4, now 2\)"),
        ({"references": {"flip": 0.5}}, r"another data.references.flip \(0.0, now 0.5\)"),
        ({"references": {"source": "same_image"}}, r"another data.references.source \(other_image, now same_image\)"),
        ({"filters": {}}, r"another data.shards.pairs.filters.min_area \(0.0, now 0.08\)"),
    ],
)
def test_a_cache_of_other_settings_is_refused_with_the_part_that_differs(
    changes: dict[str, Any], told: str, cached: tuple[DataSettings, Path], tmp_path: Path
) -> None:
    other = data_of(scene_shards(), tmp_path, **changes)
    with pytest.raises(UserError, match=f"made with {told}; run `subject-diffusion train cache`"):
        opened(other, cached[1])
    with pytest.raises(UserError, match=f"made with {told}"):
        built(other, cached[1])


def test_a_cache_of_other_frozen_models_is_refused(cached: tuple[DataSettings, Path]) -> None:
    with pytest.raises(UserError, match="made with another the autoencoder"):
        opened(*cached, vae_seed=1)
    with pytest.raises(UserError, match="made with another the image tower"):
        opened(*cached, clip_seed=1)


def test_other_nouns_are_another_cache(cached: tuple[DataSettings, Path], tmp_path: Path) -> None:
    (tmp_path / "nouns.txt").write_text("dog\n")
    with pytest.raises(UserError, match="made with another data.shards.pairs.nouns"):
        opened(data_of(scene_shards(), tmp_path, nouns=str(tmp_path / "nouns.txt")), cached[1])


def test_rebuilt_and_added_shards_are_not_taken_for_those_that_were_cached(tmp_path: Path) -> None:
    shards = Path(shutil.copytree(scene_shards(), tmp_path / "shards"))
    data = data_of(shards, tmp_path)
    folder = built(data, tmp_path / "cache")
    remove_samples(shards, {next(read_shard(shards / "00000.tar")).record.sha256})
    with pytest.raises(UserError, match="1 of 2 shards are missing; pairs/00000 was rebuilt since"):
        opened(data, folder)
    built(data, folder)
    assert opened(data, folder).scene(SamplePlace("pairs", "00000", 39, ())) is None  # 39 samples are left
    write_scene_shards(shards, 3)
    with pytest.raises(UserError, match="1 of 3 shards are missing"):
        opened(data, folder)


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    data = data_of(scene_shards(), tmp_path)
    with pytest.raises(UserError, match="no cache there; write it with `subject-diffusion train cache`"):
        opened(data, tmp_path / "nothing")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.json").write_text("{")
    with pytest.raises(UserError, match="cache.json: cannot be read"):
        opened(data, tmp_path / "cache")


def test_damaged_samples_are_no_rows_of_the_cache(tmp_path: Path) -> None:

    samples = [rendered_sample(number) for number in range(12)]
    samples[4] = replace(samples[4], jpeg=samples[4].jpeg[:300])
    write_shard(tmp_path / "shards", "00000", samples, FACTS)
    data = data_of(tmp_path / "shards", tmp_path)
    cache = opened(data, built(data, tmp_path / "cache"))
    keys = [cache.scene(SamplePlace("pairs", "00000", row, ())) for row in range(12)]
    assert [scene is None for scene in keys] == [row == 4 for row in range(12)]
    assert keys[5] is not None and keys[5].key == "00000/scene-0005"


def test_the_command_caches_the_shards_of_a_run_and_tells_what_was_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_frozen_models(tmp_path)
    run = base_run(tmp_path, data_of(scene_shards(), tmp_path, filters={}))
    config = tmp_path / "run.yaml"
    config.write_text(run.model_dump_json())
    assert main(["--config", str(config)]) == 0
    told = capsys.readouterr().out
    counts = [
        json.loads(path.read_text())["counts"] for path in (tmp_path / "base-cache" / "pairs").rglob("index.json")
    ]
    assert f"entities kept: {sum(c['kept'] for c in counts)}; left out: area" in told
    assert f"train with data.cache={tmp_path / 'base-cache'}" in told


def test_the_command_builds_the_pool_that_a_toybox_run_begins_with(tmp_path: Path) -> None:
    save_frozen_models(tmp_path)
    folder = build_cache(base_run(tmp_path, DataSettings(size=32, workers=0, cache_scenes=6)))
    assert folder.name == "pool-00000" and len(list(folder.glob("chunk-*.safetensors"))) == 1
    with pytest.raises(UserError, match="nothing to cache"):
        build_cache(base_run(tmp_path, DataSettings(size=32, workers=0)))
    with pytest.raises(UserError, match="task=vae"):
        build_cache(base_run(tmp_path, DataSettings()).model_copy(update={"task": "vae"}))
