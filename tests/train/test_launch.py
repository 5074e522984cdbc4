"""The launch scripts start what they say, from files that exist; a job that runs out of time is queued again."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.settings import load_settings
from train.settings import REPOSITORY, TrainSettings, load_model_settings

LAUNCH = REPOSITORY / "scripts" / "launch"
SCRIPTS = sorted(LAUNCH.glob("train_*"))
CONFIGS = [REPOSITORY / "configs" / "train" / name for name in ("sd15.yaml", "sd21.yaml", "sd15_24gb.yaml")]


def stand_in(folder: Path, name: str, body: str) -> None:
    """An executable found before the real one."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(body)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


def copied(script: str, folder: Path) -> Path:
    """The script in a repository of its own, whose .venv/bin holds the stand-ins."""
    place = folder / "scripts" / "launch" / script
    place.parent.mkdir(parents=True)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").mkdir()
    return Path(shutil.copy(LAUNCH / script, place))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", script], check=True)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_files_and_keys_in_its_example_exist(script: Path) -> None:
    text = script.read_text()
    example = re.findall(r"--config (\S+)", text)
    overrides = [one for one in re.findall(r"\s([a-z_.]+=\S+)", text[: text.index("set -euo")]) if "#SBATCH" not in one]
    assert example
    settings = load_settings(TrainSettings, [REPOSITORY / example[0]], overrides)
    assert settings.data.shards["laion"].folder in ("shards", "s3://bucket/shards")


def test_one_gpu_runs_the_command(tmp_path: Path) -> None:
    script = copied("train_one_gpu.sh", tmp_path)
    stand_in(tmp_path / ".venv" / "bin", "subject-diffusion", '#!/bin/bash\necho "$PWD: $*"\n')
    said = subprocess.run([script, "--config", "a.yaml", "steps=3"], check=True, capture_output=True, text=True).stdout
    assert said == f"{tmp_path}: train --config a.yaml steps=3\n"


def test_eight_gpus_are_eight_processes_of_a_file_that_exists(tmp_path: Path) -> None:
    script = copied("train_eight_gpus.sh", tmp_path)
    stand_in(tmp_path / ".venv" / "bin", "torchrun", '#!/bin/bash\necho "$*"\n')
    said = subprocess.run([script, "--config", "a.yaml"], check=True, capture_output=True, text=True).stdout
    assert said == "--standalone --nproc_per_node=8 train/run.py --config a.yaml\n"
    assert (REPOSITORY / "train" / "run.py").exists()


TRAINER = """#!{python}
import pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
pathlib.Path("started").write_text(" ".join(sys.argv[1:]))
for _ in range(600):
    time.sleep(0.05)
    if asked:
        time.sleep(0.5)
        pathlib.Path("checkpoint").touch()
        sys.exit(0)
"""
# torchrun of the stand-in is a process that does not handle the signal, around one that does.
TORCHRUN = '#!/bin/bash\n./trainer "$@" &\nwait $!\nstatus=$?\nexit $status\n'


def slurm(folder: Path, torchrun: str = TORCHRUN) -> tuple[Path, dict[str, str]]:
    """The job script beside stand-ins for SLURM's commands; `scancel` signals every process of the step."""
    script, tools = copied("train_slurm.sbatch", folder), folder / ".venv" / "bin"
    stand_in(folder, "trainer", TRAINER.format(python=sys.executable))
    stand_in(tools, "torchrun", torchrun)
    stand_in(tools, "srun", '#!/bin/bash\nshift\nsetsid "$@" &\necho $! > step\nwait $!\n')
    stand_in(tools, "scancel", '#!/bin/bash\necho "$*" > cancelled\nkill -USR1 -- "-$(cat step)"\n')
    stand_in(tools, "scontrol", '#!/bin/bash\n[ "$1" = show ] && printf "n%s\\n" {1..20000} || echo "$*" > requeued\n')
    facts = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "n[1-2]"}
    return script, {**os.environ, **facts, "SLURM_SUBMIT_DIR": str(folder)}


def test_out_of_time_the_checkpoint_is_written_and_then_the_job_queued_again(tmp_path: Path) -> None:
    script, environment = slurm(tmp_path)
    job = subprocess.Popen(["bash", script, "--config", "a.yaml"], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    assert (tmp_path / "checkpoint").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    assert (tmp_path / "cancelled").read_text() == "--signal=USR1 7\n"
    told = (tmp_path / "started").read_text()
    assert told == (
        "--nnodes=2 --nproc_per_node=4 --rdzv_id=7 --rdzv_backend=c10d --rdzv_endpoint=n1:29500 "
        "train/run.py --config a.yaml"
    )


@pytest.mark.parametrize("status", [0, 3])
def test_a_training_that_ends_by_itself_is_not_queued_again(tmp_path: Path, status: int) -> None:
    script, environment = slurm(tmp_path, f"#!/bin/bash\nexit {status}\n")
    assert subprocess.run(["bash", script, "--config", "a.yaml"], cwd=tmp_path, env=environment).returncode == status
    assert not (tmp_path / "requeued").exists()


def test_slurm_gives_five_minutes_for_the_checkpoint_and_signals_the_script_alone() -> None:
    text = (LAUNCH / "train_slurm.sbatch").read_text()
    assert "#SBATCH --signal=B:USR1@300" in text
    assert "#SBATCH --requeue" in text


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_recipes_of_stable_diffusion_load_with_their_model_file(config: Path) -> None:
    settings = load_settings(TrainSettings, [config], [])
    sizes = load_model_settings(settings.model)
    assert settings.task == "subject"
    assert settings.data.size == 512
    assert {"vae", "unet", "text_encoder"} <= set(sizes.architecture)
    drops = settings.diffusion
    assert [drops.drop_all, drops.drop_text, drops.drop_location, drops.drop_subjects] == [0.05] * 4
    assert drops.attention_loss_weight == 0.01


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda path: path.stem)
def test_the_published_recipe_is_followed(config: Path) -> None:
    settings = load_settings(TrainSettings, [config], [])
    optimizer = settings.optimizer
    assert (optimizer.learning_rate, optimizer.beta1, optimizer.beta2, optimizer.weight_decay) == (3e-5, 0.9, 0.999, 0)
    assert (optimizer.warmup_steps, optimizer.decay, settings.engine.strategy) == (1000, "constant", "zero1")
    assert settings.batch_size * settings.accumulate * 32 == 256
    assert settings.report.checkpoint_every == 5000
