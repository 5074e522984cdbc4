"""One undisturbed build that others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.engine.build import build
from tests.data_pipeline.engine.builds import small_settings


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of four finished shards."""
    output = tmp_path_factory.mktemp("undisturbed") / "shards"
    build(small_settings(output))
    return output
