"""KID of ready features, against the libraries that have it, and of pictures on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.kid import KernelInceptionDistance, poly_mmd

from data_pipeline.errors import UserError
from infer.evaluate.backbones import load_dino
from infer.evaluate.class_drift import class_drift, kid, load_measure, squared_mmd
from infer.evaluate.settings import EvaluateSettings
from tests.infer.evaluate.small_cases import picture, settings
from tests.infer.evaluate.tiny_backbones import save_tiny_dino


def features(count: int, shift: float = 0.0, seed: int = 0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_it_is_the_unbiased_estimate_by_hand() -> None:
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0]])
    # (1*2+1)^3 = 27 within x, (0+1)^3 = 1 within y; across: 1, 4^3, 1, 7^3 = 1 + 64 + 1 + 343
    assert kid(x, y) == pytest.approx(27 + 1 - 2 * 409 / 4)


class AsTheyAre(torch.nn.Module):
    """Hands features on, in the place of a network."""

    num_features = 6

    def forward(self, ready: Tensor) -> Tensor:
        return ready


def test_it_is_torchmetrics_on_the_same_features() -> None:
    first, second = features(20), features(20, 0.3, seed=1)
    metric = KernelInceptionDistance(AsTheyAre(), subsets=3, subset_size=20).set_dtype(torch.float64)
    metric.update(first, real=True)
    metric.update(second, real=False)
    mean, deviation = metric.compute()
    assert float(deviation) == pytest.approx(0, abs=1e-9)  # every subset is the whole
    assert kid(first, second, 20, 3) == pytest.approx(float(mean), rel=1e-5)
    assert squared_mmd(first, second) == pytest.approx(float(poly_mmd(first, second)), rel=1e-9)


@pytest.mark.parametrize("sizes", [(30, 30), (30, 41)])
def test_it_is_torch_fidelity_on_the_same_features_subset_by_subset(sizes: tuple[int, int]) -> None:
    first, second = features(sizes[0]), features(sizes[1], 0.3, seed=1)
    theirs = kid_features_to_metric(
        first, second, kid_subsets=7, kid_subset_size=11, rng_seed=2020, verbose=False,
        kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0,
    )  # fmt: skip
    expected = theirs["kernel_inception_distance_mean"]
    assert kid(first, second, 11, 7, seed=2020) == pytest.approx(expected, rel=1e-9)


def test_sets_of_one_kind_score_about_zero_however_few_they_are() -> None:
    scores = torch.tensor([kid(features(6, seed=2 * i), features(6, seed=2 * i + 1)) for i in range(300)])
    assert abs(float(scores.mean())) < 3 * float(scores.std()) / 300**0.5
    assert kid(features(50), features(50, 1.0, seed=1)) > 1


def test_fewer_pictures_than_a_subset_are_taken_all() -> None:
    first, second = features(8), features(5, 0.5, seed=1)
    assert kid(first, second, 1000, 3) == kid(first, second, 5, 3)


def test_a_single_feature_is_refused() -> None:
    with pytest.raises(ValueError, match="KID needs two features of each set, got 1 and 5"):
        kid(features(1), features(5))


def files(folder: Path, cases: range, of: range | None = None) -> list[Path]:
    """Pictures of those cases, drawn from the seeds `of`; None: from the cases' numbers."""
    folder.mkdir()
    paths = []
    for number, seed in zip(cases, of or cases, strict=True):
        paths.append(folder / f"{number}.png")
        picture(seed).save(paths[-1])
    return paths


@pytest.fixture
def measured(tmp_path: Path) -> EvaluateSettings:
    drift = {"images": 4, "against": "plain base"}
    methods = {name: {} for name in ("plain base", "ours", "same", "few")}
    dino = str(save_tiny_dino(tmp_path / "dino"))
    return settings(class_drift=drift, methods=methods, metrics=["dino"], backbones={"dino": dino})


def test_methods_are_compared_with_the_one_that_is_named(measured: EvaluateSettings, tmp_path: Path) -> None:
    base, ours = files(tmp_path / "base", range(6)), files(tmp_path / "ours", range(6), of=range(6, 12))
    drift = class_drift({"plain base": base, "ours": ours, "few": ours[:3]}, measured)
    dino = load_dino(str(measured.backbones.dino), "cpu")
    base_halves, own_halves = (
        [dino.features([picture(seed) for seed in range(first, last, 2)]) for first in (start, start + 1)]
        for start, last in ((0, 6), (6, 12))
    )
    expected = (kid(own_halves[0], base_halves[1]) + kid(own_halves[1], base_halves[0])) / 2
    assert set(drift) == {"plain base", "ours"} and drift["ours"] == pytest.approx(expected, rel=1e-4)
    assert drift["plain base"] == pytest.approx(kid(*base_halves), rel=1e-4)
    assert load_measure(measured).backbone == "dino"


def test_pictures_of_the_same_noise_are_not_praised_for_being_alike(measured: EvaluateSettings, tmp_path: Path) -> None:
    base, same = files(tmp_path / "base", range(6)), files(tmp_path / "same", range(6))
    drift = class_drift({"plain base": base, "same": same}, measured)
    assert drift["same"] == drift["plain base"]


def test_the_toybox_is_measured_by_its_identity_judge(tmp_path: Path) -> None:
    asked = settings(metrics=["toybox"], methods={"plain base": {}, "ours": {}})
    measure = load_measure(asked)
    codes = measure.features(picture(seed) for seed in range(3))
    assert measure.backbone == "toybox judges"
    torch.testing.assert_close(codes.square().mean(dim=1), torch.ones(3))  # of length sqrt(D)
    drift = class_drift({"plain base": files(tmp_path / "a", range(4)), "ours": files(tmp_path / "b", range(4))}, asked)
    assert list(drift) == ["plain base", "ours"]


def test_nothing_to_compare_with_and_damaged_pictures_are_told(measured: EvaluateSettings, tmp_path: Path) -> None:
    some = files(tmp_path / "some", range(4))
    with pytest.raises(UserError, match="class drift: fewer than four class pictures of 'plain base'"):
        class_drift({"ours": some}, measured)
    some[1].write_bytes(some[1].read_bytes()[:60])
    with pytest.raises(UserError, match=r"1\.png: damaged"):
        class_drift({"plain base": some, "ours": some}, measured)
