"""One chain of tiny trained models, shared by the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.tiny_runs import tiny_settings
from train.loop import train


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs: vae, clip, base and subject, each trained three steps on the one before."""
    runs = tmp_path_factory.mktemp("runs")
    for task in ("vae", "clip", "base", "subject"):
        train(tiny_settings(task, runs))
    return runs
