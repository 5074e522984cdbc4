"""Two subjects that LASR learnt apart, in one prompt of the shipped toybox: each word acts, each looks for its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from infer.pipeline import SubjectDiffusionPipeline
from infer.refine.base import open_base
from infer.refine.install import install_refinements
from infer.refine.methods.lasr import METHOD, LasrSettings
from infer.refine.prompts import SUBJECT_TEMPLATES
from infer.refine.refinement import Refinement
from infer.refine.words import prompt_inputs
from model.attention_maps import AttentionMapRecorder, cross_attention_layers, install_recording
from tests.infer.refine.tiny_base import losses_on_toybox, toybox_base, toybox_concept, written_and_read

PROMPT = "a z and a y on the beach"
pytestmark = pytest.mark.slow

WORDS = {"z": "Animals", "y": "Food"}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Refinement]:
    """Each learnt on a base of its own, which knows nothing of the other."""
    files = {}
    for word, group in WORDS.items():
        shown = toybox_concept(word, group)
        torch.manual_seed(0)
        module = METHOD.build(open_base("toybox", False, "cpu", SUBJECT_TEMPLATES), [shown], LasrSettings())
        losses_on_toybox(module, shown, 1e-2, 4)
        files[word] = written_and_read(module, METHOD.name, tmp_path_factory.mktemp(word) / f"{word}.safetensors")
    return files


@pytest.fixture(scope="module")
def together(learnt: dict[str, Refinement]) -> SubjectDiffusionPipeline:
    pipeline = open_base("toybox", False, "cpu", SUBJECT_TEMPLATES).pipeline
    install_refinements(pipeline, list(learnt.values()), toybox_base().name)
    return pipeline


def drawn(pipeline: SubjectDiffusionPipeline, prompt: str) -> np.ndarray:
    pictures = pipeline(
        prompt, num_inference_steps=6, guidance="joint", guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip
    return np.asarray(pictures[0], dtype=float) / 255


def looks_at(pipeline: SubjectDiffusionPipeline, words: tuple[str, ...]) -> Tensor:
    """Where in a half noisy picture each word's token is attended to, mean of all layers: (words, 8, 8), sum 1."""
    inputs = prompt_inputs(pipeline, [PROMPT])
    ids = [next(iter(word.ids)) for word in pipeline.words if word.placeholder in words]
    recorder = AttentionMapRecorder((inputs.input_ids[:, None] == torch.tensor(ids)[:, None]).float())
    install_recording(pipeline.unet, cross_attention_layers(pipeline.unet))
    latents = torch.randn(1, pipeline.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        context, condition = pipeline.subject_model.encode(inputs, (8, 8), inference=True)
        model = pipeline.subject_model
        model.denoise(latents, torch.tensor([500]), context, condition, cross_attention_kwargs={"recorder": recorder})
    maps = [found.mean(dim=1)[0] for found in recorder.maps.values() if found.shape[-1] == 64]  # (words, 64) each
    mean = torch.stack(maps).mean(dim=0)
    return (mean / mean.sum(dim=-1, keepdim=True)).unflatten(-1, (8, 8))


def test_each_word_acts_beside_the_other(together: SubjectDiffusionPipeline) -> None:
    whole = drawn(together, PROMPT)
    assert np.array_equal(whole, drawn(together, PROMPT))
    without = {word: drawn(together, PROMPT.replace(f"a {word}", "a thing")) for word in WORDS}
    assert all(np.abs(whole - other).mean() > 0.01 for other in without.values())
    assert np.abs(without["z"] - without["y"]).mean() > 0.01


def test_one_word_acts_as_it_does_alone(learnt: dict[str, Refinement], together: SubjectDiffusionPipeline) -> None:
    for word in WORDS:
        alone = open_base("toybox", False, "cpu", SUBJECT_TEMPLATES).pipeline
        install_refinements(alone, [learnt[word]], toybox_base().name)
        prompt = f"a {word} on the beach"
        assert np.abs(drawn(alone, prompt) - drawn(together, prompt)).max() < 0.02


def test_without_boxes_each_word_is_attended_to_in_its_own_places(together: SubjectDiffusionPipeline) -> None:
    first, second = looks_at(together, tuple(WORDS)).flatten(1)
    assert torch.isfinite(first).all() and torch.isfinite(second).all()
    assert float((first - second).abs().sum()) > 0.1
