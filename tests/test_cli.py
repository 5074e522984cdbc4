"""The `subject-diffusion` command: help is quick, and a mistake is one line on the error output and status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infer.cli import COMMANDS, main


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


def test_help_loads_no_heavy_library() -> None:
    check = (
        "import sys; from infer.cli import main\n"
        "try:\n main(['train', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'diffusers', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", check], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "error: train: the following arguments are required: --config; see subject-diffusion train --help"),
        (["train", "--config", "gone.yaml"], "error: gone.yaml: cannot be read (No such file or directory)"),
        (["train", "--config", "VAE", "--fast"], "error: train: unrecognized arguments: --fast"),
        (["train", "--config", "VAE", "stepps=3"], "error: the command line: unknown key stepps; did you mean steps?"),
        (["train", "--config", "VAE", "steps=0"], "error: the command line: steps=0: input should be greater than 0"),
        (["train", "--config", "BASE", "runs_dir=RUNS"], "error: inputs.clip: neither "),
        (["train", "--config", "VAE", "model=none.yaml", "runs_dir=RUNS"], "error: "),
    ],
)
def test_a_mistake_in_training_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toybox = Path(__file__).parent.parent / "configs" / "train" / "toybox"
    names = {
        "VAE": str(toybox / "vae.yaml"),
        "BASE": str(toybox / "base.yaml"),
        "runs_dir=RUNS": f"runs_dir={tmp_path}",
    }
    assert main([names.get(word, word) for word in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(message)
