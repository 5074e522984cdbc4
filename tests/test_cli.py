"""The `subject-diffusion` command: help is quick, and a mistake is one line on the error output and status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infer.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent


def test_without_a_command_it_tells_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generat"]) == 2
    assert capsys.readouterr().err == "error: unknown command generat; did you mean generate?\n"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_answers_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"subject-diffusion {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_refuses_an_unknown_option_in_one_line(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    required = ["--config", "any.yaml"] if command in ("data", "train", "evaluate") else []
    assert main([command, *required, "--no-such-option"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {command}: ") and "--no-such-option" in line


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in sorted(COMMANDS))], ids=" ".join)
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    check = (
        "import sys; from infer.cli import main\n"
        f"try:\n main({arguments})\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)), file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout.startswith("usage: ") and run.stderr == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "error: train: the following arguments are required: --config; see subject-diffusion train --help"),
        (["train", "--config", "gone.yaml"], "error: gone.yaml: cannot be read (No such file or directory)"),
        (["train", "--config", "VAE", "steps"], "error: steps: expected section.key=value"),
        (["train", "--config", "VAE", "stepps=3"], "error: the command line: unknown key stepps; did you mean steps?"),
        (["train", "--config", "VAE", "steps=0"], "error: the command line: steps=0: input should be greater than 0"),
        (["train", "--config", "BASE", "runs_dir=RUNS"], "error: inputs.clip: neither "),
        (["train", "--config", "VAE", "model=none.yaml", "runs_dir=RUNS"], f"error: {ROOT}/none.yaml: cannot be read"),
    ],
)
def test_a_mistake_in_training_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toybox = ROOT / "configs" / "train" / "toybox"
    names = {
        "VAE": str(toybox / "vae.yaml"),
        "BASE": str(toybox / "base.yaml"),
        "runs_dir=RUNS": f"runs_dir={tmp_path}",
    }
    assert main([names.get(word, word) for word in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(message)
