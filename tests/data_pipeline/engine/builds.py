"""Small builds of rendered scenes, as people start them: the command in a process of its own."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from data_pipeline.build_settings import DataSettings
from data_pipeline.settings import load_settings

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "data" / "toybox_pairs.yaml"
SMALL = (
    "source.scenes=24",
    "source.min_subjects=0",
    "source.shard_size=6",
    "source.size=64",
    "source.split=val",
    "rules.min_longer_side_px=64",
    "duplicates.remove=true",
)
QUICK = ("gallery=0", "engine.window=4", "engine.prefetch=4", "engine.decoders=1", "engine.threads=1")


def small_settings(output: Path, *overrides: str) -> DataSettings:
    """Four shards of six scenes, with what the renderer knows of them."""
    return load_settings(DataSettings, [CONFIG], [f"output={output}", *SMALL, *QUICK, *overrides])


def start(output: Path, *overrides: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """The same build, as a process."""
    command = [sys.executable, "-m", "data_pipeline.run", "--config", str(CONFIG), f"output={output}", *options]
    return subprocess.Popen(
        [*command, *SMALL, *QUICK, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Whoever started the tests in the background told their children to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def files_of(folder: Path) -> dict[str, str]:
    """Name -> hash of all that a build leaves behind, but for its lock."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".lock"
    }


def wait_for(condition: object, seconds: float = 60.0) -> None:
    """Until a function of no arguments is true.

    Raises:
        TimeoutError: it does not become so.
    """
    assert callable(condition)
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.02)
