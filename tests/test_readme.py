"""The README's commands and Python lines are run as they stand, in few steps and into a folder of the test."""

from __future__ import annotations

import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest

from data_pipeline.build_settings import DataSettings
from data_pipeline.settings import load_settings
from infer.cli import COMMANDS, main
from infer.evaluate.methods import plan_methods
from infer.evaluate.settings import EvaluateSettings
from train.settings import TrainSettings

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands(start: str) -> list[list[str]]:
    """Arguments of each command of the README's code blocks that begins with `start`."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    text = "".join(block for language, block in blocks if not language)
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[len(start.split()) :] for line in lines if line.startswith(start)]


def generate_commands(*, refined: bool) -> list[list[str]]:
    found = commands("subject-diffusion generate")
    return [words for words in found if any(".safetensors" in word for word in words) == refined]


@pytest.mark.parametrize("arguments", generate_commands(refined=False), ids=lambda arguments: arguments[1])
def test_a_generate_command_draws(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["generate", *arguments, "steps=2", f"output={tmp_path}"]) == 0
    assert Path(capsys.readouterr().out.splitlines()[-1]).exists()


def test_what_its_refine_commands_write_is_drawn_by_its_generate_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("penguin", "turtle"):
        shutil.copy(ROOT / "infer" / "examples" / f"{name}.png", tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    quick = ["options.steps=2", "report.preview_steps=1", "runs_dir=runs"]
    found = commands("subject-diffusion refine")
    for arguments in [*found, [*found[-1], "--output", "tom.safetensors", "--class-word", "cat"]]:
        assert main(["refine", *arguments, *quick]) == 0
    for arguments in generate_commands(refined=True):
        assert main(["generate", *arguments, "steps=2", "output=drawn"]) == 0
        assert Path(capsys.readouterr().out.splitlines()[-1]).exists()


def train_commands() -> list[list[str]]:
    """Arguments of `train`, however it is started."""
    started = commands("subject-diffusion train") + [line[3:] for line in commands("torchrun")]
    scripts = [line for one in ("one_gpu", "eight_gpus") for line in commands(f"scripts/launch/train_{one}.sh")]
    return started + scripts + [line[2:] for line in commands("sbatch")]


@pytest.mark.parametrize("arguments", train_commands(), ids=lambda arguments: " ".join(arguments[:4]))
def test_a_train_command_has_settings_that_load(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rest = arguments[1:] if arguments[0] in ("cache", "export") else arguments
    files = [Path(value) for name, value in pairwise(rest) if name == "--config"]
    assert files and load_settings(TrainSettings, files, [word for word in rest if "=" in word])


def test_its_evaluate_commands_have_settings_that_load() -> None:
    found = commands("subject-diffusion evaluate")
    assert found
    for arguments in found:
        assert arguments[0] == "--config"
        overrides = [word for word in arguments[2:] if "=" in word]
        assert plan_methods(load_settings(EvaluateSettings, [ROOT / arguments[1]], overrides))


def test_its_data_commands_have_settings_that_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = [arguments for arguments in commands("subject-diffusion data") if arguments[0] == "--config"]
    assert found
    for arguments in found:
        overrides = [word for word in arguments[2:] if "=" in word]
        assert load_settings(DataSettings, [Path(arguments[1])], overrides)


def test_its_python_lines_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (lines,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(lines.replace(" guidance_scale=", " num_inference_steps=2, guidance_scale="), names)
    assert getattr(names["picture"], "size", None) == (64, 64)


def test_it_names_every_command_and_make_target() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    expected = {f"make {target}" for target in targets} | {f"subject-diffusion {command}" for command in COMMANDS}
    assert not {text for text in expected if text not in README + (ROOT / "CONTRIBUTING.md").read_text()}
