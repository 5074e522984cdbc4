"""A build from settings to shards: what is in them, what may change, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import pytest
import torch
import yaml

from data_pipeline.build_settings import DataSettings
from data_pipeline.engine.build import build, dry_run
from data_pipeline.errors import UserError
from data_pipeline.settings import load_settings, settings_text
from data_pipeline.shards.reader import decode_sample, list_shards, read_shard
from data_pipeline.shards.storage import storage_of, temporary_path
from data_pipeline.shards.verify import verify
from data_pipeline.toybox.world import ToyboxWorld
from tests.data_pipeline.engine.builds import CONFIG, files_of, small_settings


def samples_of(folder: Path) -> list:
    return [sample for shard in list_shards(folder) for sample in read_shard(shard.tar)]


def test_a_finished_set_is_whole_and_says_what_the_source_said(undisturbed: Path) -> None:
    report = verify(str(undisturbed))
    assert report.ok, report.lines()
    samples = samples_of(undisturbed)
    world = ToyboxWorld("val", size=64)
    for sample in samples[:8]:
        record, decoded = sample.record, decode_sample(sample)
        scene = world.scene(int(record.key.rsplit("-", 1)[-1]))
        assert record.caption == scene.caption
        assert [e.box_xyxy_px for e in record.entities] == [e.box_xyxy_px for e in scene.entities]
        for entity, mask, truth in zip(record.entities, decoded.masks, scene.entities, strict=True):
            assert (mask == truth.mask).all()
            assert entity.subject_id == truth.subject.id and len(entity.references) == len(truth.references)
            assert entity.caption_span is None or record.caption[slice(*entity.caption_span)] == entity.phrase


def test_pictures_without_entities_are_dropped_with_the_reason(undisturbed: Path) -> None:
    stats = [json.loads(path.read_text()) for path in undisturbed.glob("*_stats.json")]
    scenes = [ToyboxWorld("val", size=64).scene(i) for i in range(24)]
    assert sum(s["dropped"].get("too_few_entities", 0) for s in stats) == sum(not s.entities for s in scenes)
    assert sum(s["read"] for s in stats) == 24


def test_nothing_is_done_twice(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()}
    build(small_settings(undisturbed))
    assert "nothing left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in undisturbed.iterdir()} == before


def test_a_build_in_this_process_leaves_its_thread_counts_as_they_were(tmp_path: Path) -> None:
    before = torch.get_num_threads(), cv2.getNumThreads()
    try:
        torch.set_num_threads(3)
        cv2.setNumThreads(3)
        build(small_settings(tmp_path, "engine.threads=2"))
        assert (torch.get_num_threads(), cv2.getNumThreads()) == (3, 3)
    finally:
        torch.set_num_threads(before[0])
        cv2.setNumThreads(before[1])


def test_what_a_killed_search_for_copies_left_half_written_is_removed(tmp_path: Path) -> None:
    dead = temporary_path(storage_of(tmp_path / "duplicates"), "00000.json")
    dead = dead.with_name(dead.name.replace(f".{os.getpid()}.", ".999999999."))
    dead.parent.mkdir(exist_ok=True)
    dead.write_text("{")
    build(small_settings(tmp_path))
    assert not dead.exists() and (tmp_path / "duplicates" / "00000.json").exists()


def test_two_workers_and_other_windows_build_the_same(tmp_path: Path, undisturbed: Path) -> None:
    build(small_settings(tmp_path / "a", "engine.workers=2", "engine.window=3", "engine.prefetch=2"))
    shards = {name: value for name, value in files_of(undisturbed).items() if name != "settings.yaml"}
    assert shards.items() <= files_of(tmp_path / "a").items()


def test_another_setting_on_a_begun_output_is_refused_by_its_key(undisturbed: Path) -> None:
    with pytest.raises(UserError, match=r"begun with rules.nms_iou=0.5, now rules.nms_iou=0.7; use another output"):
        build(small_settings(undisturbed, "rules.nms_iou=0.7"))
    with pytest.raises(UserError, match=r"begun with source.seed=0, now source.seed=1"):
        build(small_settings(undisturbed, "source.seed=1"))


def test_another_version_of_the_program_on_a_begun_output_is_refused(
    undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_pipeline.engine.output.program_version", lambda: "9.9")
    with pytest.raises(UserError, match=r"built by version .*, this is 9.9; finish it with that version"):
        build(small_settings(undisturbed))


def test_copies_are_left_out_wherever_they_stand(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    build(small_settings(tmp_path / "source"))
    first, *others = [sample.jpeg for sample in samples_of(tmp_path / "source")][:4]
    for number, jpeg in enumerate([first, *others, first]):
        (photos / f"{number}.jpg").write_bytes(jpeg)
        (photos / f"{number}.json").write_text(
            '{"caption": "a toy", "entities": [{"noun": "toy", "box_xyxy_px": [8, 8, 40, 40]}]}'
        )
    settings = small_settings(tmp_path / "out").model_dump()
    settings["source"] = {"kind": "folder", "path": str(photos), "shard_size": 2}
    totals = build(type(small_settings(tmp_path / "out")).model_validate(settings))
    assert (totals.kept, dict(totals.dropped)) == (4, {"duplicate": 1})


def test_one_stage_is_run_again_over_finished_shards(tmp_path: Path) -> None:
    output, without_masks = tmp_path / "shards", ("stages.segment.iterations=1",)
    photos = tmp_path / "photos"
    photos.mkdir()
    build(small_settings(tmp_path / "source"))
    for sample in samples_of(tmp_path / "source"):
        (photos / f"{sample.record.key}.jpg").write_bytes(sample.jpeg)
        entities = [{"noun": e.noun, "box_xyxy_px": list(e.box_xyxy_px)} for e in sample.record.entities]
        (photos / f"{sample.record.key}.json").write_text(json.dumps({"caption": "a toy", "entities": entities}))

    def settings(folder: Path, *overrides: str):  # type: ignore[no-untyped-def]
        values = small_settings(folder, *overrides).model_dump()
        values["source"] = {"kind": "folder", "path": str(photos), "shard_size": 6}
        return type(small_settings(folder)).model_validate(values)

    build(settings(output))
    build(settings(tmp_path / "fresh", *without_masks))
    with pytest.raises(UserError, match="begun with stages.segment.iterations=2"):
        build(settings(output, *without_masks))
    build(settings(output, *without_masks), redo="segment")
    again, fresh = samples_of(output), samples_of(tmp_path / "fresh")
    assert [s.record for s in again] == [s.record for s in fresh]
    assert verify(str(output)).ok
    build(settings(output, *without_masks))  # fits the output now
    with pytest.raises(UserError, match="begun with source.shard_size"):
        values = settings(output, *without_masks).model_dump()
        values["source"]["shard_size"] = 7
        build(type(small_settings(output)).model_validate(values), redo="segment")


def test_there_is_nothing_to_redo_before_something_is_finished(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished shard; build it first"):
        build(small_settings(tmp_path / "none"), redo="segment")


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    text = dry_run(small_settings(tmp_path / "none"))
    assert "4 of 4 shards to build, 24 pictures" in text and not (tmp_path / "none").exists()


def test_a_device_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine.device=cuda:7: torch sees \d+ CUDA devices"):
        build(small_settings(tmp_path / "none", "engine.device=cuda:7"))


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIG.parent.glob("*.yaml")))
def test_every_shipped_configuration_loads(name: str) -> None:
    load_settings(DataSettings, [CONFIG.parent / name], [])


def test_the_configuration_for_laion_names_every_key() -> None:
    path = CONFIG.parent / "laion.yaml"
    told = yaml.safe_load(path.read_text())
    known = yaml.safe_load(settings_text(load_settings(DataSettings, [path], [])))
    known["stages"]["nouns"].pop("ignore")  # 150 words

    def keys(section: dict, prefix: str = "") -> set[str]:
        return {
            name
            for key, value in section.items()
            for name in ({prefix + key} | (keys(value, f"{prefix}{key}.") if isinstance(value, dict) else set()))
        }

    assert keys(told) == keys(known)
