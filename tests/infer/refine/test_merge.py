"""The closed form keeps what each concept was tuned to, and moves ordinary captions as little as can be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from data_pipeline.errors import UserError
from data_pipeline.settings import settings_of
from infer.refine.custom_diffusion_merge import ClosedForm, _states, _target_texts, regularisation_captions
from infer.refine.install import install_refinements
from infer.refine.methods.custom_diffusion import METHOD, CustomDiffusionSettings
from infer.refine.refinement import Refinement, rename_placeholders
from infer.refine.weight_deltas import base_weights
from tests.infer.refine.tiny_base import concept, drawn, refinement_of, tiny_base, tiny_batch, tune
from tests.infer.tiny_model import TinyModel


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cost(weight: torch.Tensor, start: torch.Tensor, known: torch.Tensor) -> float:
    return float(((weight.double() - start) @ known.T).norm())


def test_one_target_in_two_dimensions_by_hand() -> None:
    # C_reg = diag(1, 2), W0 = 0, c = (1, 1), v = 3: minimise a^2 + 4 b^2 with a + b = 3, so a = 2.4 and b = 0.6.
    solver = ClosedForm(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0]]))
    found = solver.weight(torch.zeros(1, 2), torch.tensor([[3.0]]))
    assert torch.allclose(found, torch.tensor([[2.4, 0.6]]), atol=1e-5)


def test_the_constraint_holds_and_no_feasible_point_is_cheaper() -> None:
    known, targets = numbers(60, 12), numbers(3, 12, seed=1)
    start, values = numbers(5, 12, seed=2), numbers(3, 5, seed=3)
    found = ClosedForm(known, targets).weight(start, values)
    assert torch.allclose(found.double() @ targets.T, values.T, atol=1e-4)
    least = cost(found, start, known)
    basis = torch.linalg.svd(targets)[2][3:]  # (9, 12) directions that leave the targets alone
    for seed in range(200):
        step = numbers(5, 9, seed=seed) @ basis * 10.0 ** (seed % 5 - 3)
        other = found.double() + step
        assert torch.allclose(other @ targets.T, values.T, atol=1e-3)
        assert cost(other, start, known) >= least * (1 - 1e-6)


def test_a_base_that_serves_already_stays_as_it_is() -> None:
    known, targets, start = numbers(60, 12), numbers(3, 12, seed=1), numbers(5, 12, seed=2)
    found = ClosedForm(known, targets).weight(start, targets @ start.T)
    assert torch.allclose(found.double(), start, atol=1e-5)


def test_captions_of_ordinary_things_are_two_hundred_and_always_the_same() -> None:
    captions = regularisation_captions()
    assert len(captions) == 200 and len(set(captions)) > 150 and captions == regularisation_captions()


@pytest.fixture(scope="module")
def tuned(tiny_model: TinyModel) -> tuple[Refinement, Refinement]:
    """Two subjects, tuned apart: z dog and y mug."""
    files = []
    for word, noun, colour in (("z", "dog", 0), ("y", "mug", 1)):
        base, subject = tiny_base(tiny_model), concept(word, noun)
        settings = settings_of(CustomDiffusionSettings, {"token": noun}, "options")
        module = METHOD.build(base, [subject], settings)
        tune(module, tiny_batch(f"a {word} {noun}", f"a photo of a {word} {noun}", seed=colour))
        files.append(refinement_of("custom-diffusion", module, subject))
    return files[0], files[1]


def test_merged_weights_keep_what_each_concept_was_tuned_to(tiny_model: TinyModel, tuned) -> None:
    pipeline = tiny_base(tiny_model).pipeline
    start = {name: value.clone() for name, value in base_weights(pipeline).items()}
    install_refinements(pipeline, tuned, "tiny")
    weights = base_weights(pipeline)
    ordinary = _states(pipeline, regularisation_captions(40))
    for file in tuned:
        states = _states(pipeline, _target_texts(file))
        for name in (name for name in file.tensors if name.startswith("unet.")):
            wanted = states @ file.tensors[name].double().T
            assert torch.allclose(states @ weights[name].double().T, wanted, atol=1e-4)
            moved = (ordinary @ (weights[name] - start[name]).double().T).norm()
            own = (ordinary @ (file.tensors[name] - start[name]).double().T).norm()
            assert moved < own  # ordinary captions move less than under the tuned weights themselves
    assert drawn(pipeline, "a z dog beside a y mug").isfinite().all()


def test_targets_are_the_names_own_tokens(tiny_model: TinyModel, tuned) -> None:
    pipeline = tiny_base(tiny_model).pipeline
    install_refinements(pipeline, tuned[:1], "tiny")
    assert _target_texts(tuned[0]) == [("z dog", "z dog"), ("photo of a z dog", "z dog")]
    assert _states(pipeline, _target_texts(tuned[0])).shape == (4, 32)  # z and dog, alone and in a photo


def test_files_with_the_same_placeholder_are_renamed_first(tiny_model: TinyModel, tuned) -> None:
    other = rename_placeholders(tuned[1], [("y", "z")])
    with pytest.raises(UserError, match="placeholder 'z' is also that of .*; rename one of them"):
        install_refinements(tiny_base(tiny_model).pipeline, [tuned[0], other], "tiny")
    pipeline = tiny_base(tiny_model).pipeline
    install_refinements(pipeline, [tuned[0], rename_placeholders(other, [("z", "q")])], "tiny")
    assert drawn(pipeline, "a z dog beside a q mug").isfinite().all()


def test_files_that_tuned_more_than_keys_and_values_do_not_merge(tiny_model: TinyModel, tuned) -> None:
    name = next(name for name in tuned[1].tensors if name.startswith("unet.")).replace("to_k", "to_q")
    whole = replace(tuned[1], tensors=tuned[1].tensors | {name: tuned[1].tensors[name.replace("to_q", "to_k")]})
    pipeline = tiny_base(tiny_model).pipeline
    if base_weights(pipeline)[name].shape != whole.tensors[name].shape:
        whole.tensors[name] = base_weights(pipeline)[name].clone()
    with pytest.raises(UserError, match="to_q.weight was tuned too, and only keys and values can be merged"):
        install_refinements(pipeline, [tuned[0], whole], "tiny")
