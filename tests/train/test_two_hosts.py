"""A host that dies in mid-run and comes back costs the steps since the last checkpoint, and changes nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.train.tiny_runs import tiny_settings

ROOT = Path(__file__).parents[2]
SCRIPT = [sys.executable, str(ROOT / "scripts" / "two_hosts.py")]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and `ip`")
@pytest.mark.parametrize("killed", ["second", "first"])
def test_a_host_killed_in_mid_run_and_started_again_ends_with_the_same_weights(killed: str, tmp_path: Path) -> None:
    settings = tiny_settings("vae", tmp_path, steps=60, report__checkpoint_every=10, report__checkpoints_kept=2)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    ran = subprocess.run(
        [*SCRIPT, "--config", str(config), "--kill", killed], cwd=ROOT, capture_output=True, text=True, timeout=1500
    )
    logs = "".join(log.read_text()[-1500:] for log in sorted(tmp_path.rglob("host-*.log")))
    assert ran.returncode == 0, ran.stdout + ran.stderr + logs
    assert f"host {1 if killed == 'first' else 2} killed after step-000000" in ran.stdout
    assert "end with the same weights" in ran.stdout
    assert "resumes at step" in logs or "resumes at step" in (tmp_path / "vae/disturbed/host-1.log").read_text()


def test_without_root_it_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"task: vae\nname: hosts\nsteps: 1\nruns_dir: {tmp_path}\n")
    code = f"import os, runpy, sys; os.geteuid = lambda: 1000; sys.argv = {SCRIPT[1:] + ['--config', str(config)]!r}; "
    ran = subprocess.run(
        [sys.executable, "-c", code + "runpy.run_path(sys.argv[0], run_name='__main__')"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert "network namespaces need root" in ran.stderr
