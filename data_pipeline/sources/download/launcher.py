"""Runs img2dataset under the guard: `PYTHON launcher.py`, PYTHON being that of its own environment.

The environment variable SUBJECT_DIFFUSION_DOWNLOAD holds {"limits": …, "download": arguments of img2dataset} as JSON.
img2dataset spawns its workers, and each of them imports this file before it does anything else: so each of them
installs the guard, and one that cannot never fetches. Standard input is a pipe from the builder; when it ends, the
builder is gone and so is the whole group of processes.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading

# Both by name: this environment has img2dataset and no part of the project, ours the other way round.
guard = importlib.import_module("guard")  # the file beside this one
ORDER = json.loads(os.environ["SUBJECT_DIFFUSION_DOWNLOAD"])
guard.install(
    guard.Limits(
        allow_hosts=frozenset(ORDER["limits"]["allow_hosts"]),
        max_bytes=ORDER["limits"]["max_bytes"],
        deadline_s=ORDER["limits"]["deadline_s"],
    )
)


def end_with_builder() -> None:
    """Waits for the builder to end."""
    while sys.stdin.buffer.read(1):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    threading.Thread(target=end_with_builder, daemon=True).start()
    importlib.import_module("img2dataset").download(**ORDER["download"])


if __name__ == "__main__":
    main()
