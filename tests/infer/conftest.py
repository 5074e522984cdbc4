"""What the tests of generation share: one tiny model on disk, its pipeline, and cut-outs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from infer.pipeline import SubjectDiffusionPipeline
from tests.infer.tiny_model import TinyModel, build_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return build_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def loaded_pipeline(tiny_model: TinyModel) -> SubjectDiffusionPipeline:
    pipeline = SubjectDiffusionPipeline.from_pretrained(tiny_model.subject)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def cutout() -> Callable[..., Image.Image]:
    """cutout(seed) -> a small RGBA picture whose corners are transparent; other seeds look different."""

    def build(seed: int = 0, size: int = 24) -> Image.Image:
        random = np.random.default_rng(seed)
        pixels = np.zeros((size, size, 4), np.uint8)
        pixels[4:-4, 4:-4, :3] = random.integers(0, 255, 3, dtype=np.uint8)
        pixels[8:-8, 6:-6, :3] = random.integers(0, 255, 3, dtype=np.uint8)
        pixels[4:-4, 4:-4, 3] = 255
        return Image.fromarray(pixels)

    return build
