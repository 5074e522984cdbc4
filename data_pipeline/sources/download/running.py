"""Drives img2dataset in a process group of its own: starts it, follows its shards, ends it, says what went wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.errors import UserError

Progress = Callable[[int, int], None]  # pictures tried, pictures in all
LAUNCHER = Path(__file__).with_name("launcher.py")
POLL_S = 0.5


def run_download(
    python: Path,
    order: Mapping[str, Any],
    shards: Mapping[str, int],
    folder: Path,
    log: Path,
    *,
    stall_s: float,
    progress: Progress | None,
) -> None:
    """Run img2dataset until every shard is complete or it ends.

    Args:
        python: of an environment that has img2dataset.
        order: what `launcher.py` expects.
        shards: pictures of each shard, by name.
        folder: where img2dataset writes them.
        log: takes all that it prints.
        stall_s: it is ended if it completes no shard for so long (a worker killed for lack of memory is never missed
            by it).
        progress: told twice a second.
    Raises:
        UserError: it ended or was ended before all shards were complete.
    """
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment.update(
        SUBJECT_DIFFUSION_DOWNLOAD=json.dumps(order),
        OPENCV_IO_MAX_IMAGE_PIXELS=str(order["limits"]["max_pixels"]),
        WANDB_MODE="disabled",
        NO_ALBUMENTATIONS_UPDATE="1",  # else it asks a registry for its newest version
        PYTHONPATH="",
    )
    total = sum(shards.values())
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(python), str(LAUNCHER)],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            done, since = -1, time.monotonic()
            while process.poll() is None:
                complete = complete_shards(folder, shards)
                if len(complete) > done:
                    done, since = len(complete), time.monotonic()
                if progress is not None:
                    progress(sum(shards[name] for name in complete), total)
                if time.monotonic() - since > stall_s:
                    raise UserError(
                        f"source.download: no shard was completed for {stall_s / 60:.0f} minutes, see {log}; lower "
                        "source.processes or source.threads and start again: complete shards are kept"
                    )
                time.sleep(POLL_S)
        finally:
            _end(process)
    complete = complete_shards(folder, shards)
    if progress is not None:
        progress(sum(shards[name] for name in complete), total)
    if len(complete) < len(shards):
        raise UserError(
            f"source.download: {len(shards) - len(complete)} of {len(shards)} shards are not complete "
            f"({_last_line(log)}); see {log}, then start again: complete shards are kept"
        )


def complete_shards(folder: Path, names: Sequence[str] | Mapping[str, int]) -> list[str]:
    """Those of the shards whose statistics are there."""
    return [name for name in names if (folder / f"{name}_stats.json").exists()]


def remove_half_written(folder: Path) -> None:
    """Statistics that were cut off are no sign of completion, but img2dataset would take them for one."""
    for file in folder.glob("*_stats.json"):
        try:
            json.loads(file.read_text(encoding="utf-8"))["count"]
        except (ValueError, KeyError, TypeError):
            file.unlink()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the whole group; its leader may be gone already."""
    assert process.stdin is not None
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    process.stdin.close()


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "it said nothing")
