"""A whole evaluation on a tiny model: restartable, in one or several processes, and honest about what is missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import yaml
from PIL import Image

from infer.cli import main
from tests.infer.evaluate.tiny_backbones import save_tiny_clip, save_tiny_detector, save_tiny_dino
from tests.infer.tiny_model import TinyModel

ROOT = Path(__file__).parents[3]
NOT_REPEATABLE = ["seconds", "memory_bytes", "picture"]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture
def write(tmp_path: Path, tiny_model: TinyModel, dino: Path, cutout: Callable[..., Image.Image]) -> Write:
    """write(name, **changes) -> a configuration file: two subjects, two prompts, two seeds, a pair; four methods."""
    photos = tmp_path / "photos"
    for seed, noun in enumerate(("cat", "dog")):
        (photos / noun).mkdir(parents=True)
        for number in range(2):
            cutout(10 * seed + number).save(photos / noun / f"{number}.png")
    prompts = {
        "object": {"new scene": ["a {} on the beach"], "property change": ["a red {}"]},
        "pair": {"relation": ["a {} next to a {}"]},
    }
    (tmp_path / "prompts.yaml").write_text(yaml.safe_dump(prompts))
    methods = {
        "ours": {"kind": "zero_shot", "model": str(tiny_model.subject), "steps": 4},
        "plain base": {"kind": "plain_base", "base": str(tiny_model.base), "steps": 4},
        "copied reference": {"kind": "copied_reference", "size": 64},
        "real photo": {"kind": "real_render"},
    }

    def build(name: str, **changes: Any) -> Path:
        content = {
            "name": "tiny",
            "output": str(tmp_path / name),
            "protocol": {
                "kind": "folder",
                "folder": str(photos),
                "prompts": str(tmp_path / "prompts.yaml"),
                "seeds": 2,
                "pairs": 1,
            },
            "methods": methods,
            "metrics": ["dino", "diversity"],
            "backbones": {"dino": str(dino)},
            "crops": "none",
            "batch_size": 3,
            "processes": 1,
            **changes,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return tmp_path / f"{name}.yaml"

    return build


def evaluate(config: Path, *words: str) -> int:
    return main(["evaluate", "--config", str(config), *words])


def table(folder: Path) -> pandas.DataFrame:
    found = pandas.read_parquet(folder / "scores.parquet")
    return found.drop(columns=NOT_REPEATABLE).sort_values(["method", "case"]).reset_index(drop=True)


def pictures(folder: Path) -> dict[str, bytes]:
    """Pixels of every picture of a run."""
    found = sorted((folder / "pictures").rglob("*.png"))
    return {str(path.relative_to(folder)): Image.open(path).convert("RGB").tobytes() for path in found}


def test_a_run_answers_every_case_and_writes_its_report(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(write("out")) == 0
    told = capsys.readouterr().out.splitlines()
    # 2 subjects x 2 prompts x 2 seeds and one pair's prompt; real photos of pairs there are none.
    assert told[0].startswith("evaluate tiny: 4 rows, 35 pictures, 0 of them there; about ") and "hours on 1" in told[0]
    scores = table(tmp_path / "out")
    counted = scores.groupby(["method", "part"]).size().to_dict()
    assert counted == {
        **{(name, "single"): 8 for name in ("ours", "plain base", "copied reference", "real photo")},
        **{(name, "pair"): 1 for name in ("ours", "plain base", "copied reference")},
    }
    assert scores["dino"].notna().all() and (scores.loc[scores.method == "copied reference", "copy"] > 0).any()
    for name in ("report.html", "report.md", "settings.yaml", "references/cat/0.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_the_same_command_again_draws_nothing_and_tells_the_same(write: Write, tmp_path: Path) -> None:
    config = write("out")
    evaluate(config)
    before, first = (
        {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "pictures").rglob("*.png")},
        table(tmp_path / "out"),
    )
    assert evaluate(config) == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "pictures").rglob("*.png")}
    pandas.testing.assert_frame_equal(first, table(tmp_path / "out"))


def test_several_processes_give_the_tables_of_one(write: Write, tmp_path: Path) -> None:
    evaluate(write("alone"))
    assert evaluate(write("together"), "--processes", "2") == 0
    assert pictures(tmp_path / "alone") == pictures(tmp_path / "together")
    pandas.testing.assert_frame_equal(table(tmp_path / "alone"), table(tmp_path / "together"))


def kill_and_restart(config: Path, folder: Path, kills: int) -> None:
    """Start the command `kills` times and kill it (SIGKILL) each time some more files are there; then let it end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "infer.cli", "evaluate", "--config", str(config)]
    for kill in range(kills):
        goal = 35 * (kill + 1) // (kills + 1)
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as running:
            while running.poll() is None and len(list((folder / "pictures").rglob("*.png"))) < goal:
                time.sleep(0.002)
            running.send_signal(signal.SIGKILL)
    assert subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_restarted_it_gives_the_same_pictures_and_tables(write: Write, tmp_path: Path, kills: int) -> None:
    evaluate(write("whole"))
    kill_and_restart(write("killed"), tmp_path / "killed", kills)
    assert pictures(tmp_path / "whole") == pictures(tmp_path / "killed")
    pandas.testing.assert_frame_equal(table(tmp_path / "whole"), table(tmp_path / "killed"))


def test_all_metrics_and_class_drift_measure_one_run_together(
    write: Write, tmp_path: Path, dino: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    networks = {
        "dino": str(dino),
        "clip": str(save_tiny_clip(tmp_path / "clip")),
        "detector": str(save_tiny_detector(tmp_path / "detector")),
    }
    drift = {"images": 6, "against": "plain base"}
    metrics = ["clip", "dino", "diversity"]
    config = write("out", backbones=networks, class_drift=drift, metrics=metrics, crops="detected")
    assert evaluate(config) == 0
    scores = table(tmp_path / "out")
    assert set(scores[scores.part == "class"].method) == {"ours", "plain base"}
    assert set(scores[scores.part == "class"].prompt) == {"a cat", "a dog"}
    shown = scores[scores.part != "class"]
    for name in ("clip_t", "clip_i", "clip_i_all", "clip_i_crop", "dino", "dino_all", "dino_crop", "copy"):
        assert shown[name].notna().all(), name
    assert shown.loc[shown.part == "single", "diversity"].notna().all()
    told = (tmp_path / "out" / "report.md").read_text()
    assert "CLIP-T" in told and "KID" in told
    capsys.readouterr()


def test_only_and_limit_draw_a_part_and_the_rest_follows_later(write: Write, tmp_path: Path) -> None:
    config = write("out")
    evaluate(config, "--only", "ours,real photo", "--limit", "1")
    assert {path.split("/")[1:3][0] for path in pictures(tmp_path / "out")} == {"ours", "real_photo"}
    assert set(table(tmp_path / "out").group) == {"cat", "cat+dog"}
    assert evaluate(config) == 0
    evaluate(write("whole"))
    pandas.testing.assert_frame_equal(table(tmp_path / "out"), table(tmp_path / "whole"))


def test_a_method_whose_name_holds_a_comma_can_be_asked_for(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    methods = {"real, as it is": {"kind": "real_render"}, "copied": {"kind": "copied_reference"}}
    assert evaluate(write("out", methods=methods), "--only", "real, as it is", "--dry-run") == 0
    assert capsys.readouterr().out.startswith("evaluate tiny: 1 rows, 8 pictures")


def test_a_dry_run_writes_nothing(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(write("out"), "--dry-run") == 0
    assert "hours on 1 process" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_a_report_alone_marks_what_is_not_drawn(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write("out")
    evaluate(config, "--only", "ours")
    assert evaluate(config, "--report") == 1
    assert "hole: plain base, cat: 4 of 4 pictures are not drawn" in capsys.readouterr().out
    assert "plain base" in (tmp_path / "out" / "report.html").read_text()


def test_a_method_without_weights_is_a_hole_and_the_rest_goes_on(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write("out")
    content = yaml.safe_load(config.read_text())
    content["methods"]["plain base"]["base"] = str(tmp_path / "gone")
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    assert evaluate(config) == 1
    told = capsys.readouterr()
    assert "Traceback" not in told.err and "hole: plain base" in told.out and "no such folder" in told.out
    assert set(table(tmp_path / "out").method) == {"ours", "copied reference", "real photo"}


def test_a_backbone_that_cannot_be_loaded_is_a_hole_and_can_be_scored_later(
    write: Write, tmp_path: Path, dino: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(write("out", backbones={"dino": str(tmp_path / "gone")})) == 1
    out = capsys.readouterr().out
    assert "hole: metric dino" in out and str(tmp_path / "gone") in out and "dino" not in table(tmp_path / "out")
    before = pictures(tmp_path / "out")
    assert evaluate(write("out")) == 0
    assert table(tmp_path / "out")["dino"].notna().all() and pictures(tmp_path / "out") == before


def test_a_half_written_score_file_is_told_and_scored_anew(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write("out")
    evaluate(config)
    first, broken = table(tmp_path / "out"), tmp_path / "out" / "scores" / "ours" / "cat.json"
    broken.write_text(broken.read_text()[:50])
    capsys.readouterr()
    assert evaluate(config, "--report") == 1
    assert f"hole: {broken}: a half-written score file" in capsys.readouterr().out
    assert evaluate(config) == 0
    assert json.loads(broken.read_text())
    pandas.testing.assert_frame_equal(first, table(tmp_path / "out"))


def test_a_damaged_picture_is_named_and_the_rest_goes_on(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write("out")
    evaluate(config)
    picture = tmp_path / "out" / "pictures" / "ours" / "dog" / "dog--00--1.png"
    picture.write_bytes(picture.read_bytes()[:-2000])
    (tmp_path / "out" / "scores" / "ours" / "dog.json").unlink()
    assert evaluate(config) == 1
    assert f"{picture}: damaged" in capsys.readouterr().out
    picture.unlink()
    assert evaluate(config) == 0


def test_changed_settings_do_not_mix_with_stored_pictures(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    config = write("out")
    evaluate(config, "--only", "ours", "--limit", "1")
    content = yaml.safe_load(config.read_text())
    content["methods"]["ours"]["steps"] = 2
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    capsys.readouterr()
    assert evaluate(config) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "another steps than 'ours' has now; give another output=" in line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "theirs"], "--only theirs: no such method; the configuration has ours, plain base"),
        (["--limit", "0"], "evaluate: argument --limit: expected a whole number from 1, got '0'"),
        (["metrics=[dyno]"], "dyno"),
        (["protocol.prompts=gone.yaml"], "protocol.prompts=gone.yaml: cannot be read"),
        (["methods.ours.stepz=3"], "methods.ours: unknown key stepz; did you mean steps?"),
        (["class_drift.images=4", "class_drift.against=theirs"], "class_drift.against: no method 'theirs'"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(
    write: Write, words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(write("out"), *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line
