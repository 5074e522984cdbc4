"""Diversity within a prompt: the mean distance of a picture to the others."""

from __future__ import annotations

import pytest

from infer.evaluate.backbones import DinoBackbone, load_dino
from infer.evaluate.metrics import Drawn
from infer.evaluate.metrics.diversity import DiversityMetric
from tests.infer.evaluate.small_cases import case, picture, subject
from tests.infer.evaluate.tiny_backbones import save_tiny_dino

DOG = subject("dog", [picture(9)])


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> DinoBackbone:
    return load_dino(str(save_tiny_dino(tmp_path_factory.mktemp("dino"))), "cpu")


def drawn(*asked: tuple[str, int]) -> list[Drawn]:
    return [Drawn(case(DOG, prompt=prompt, seed=i), picture(seed)) for i, (prompt, seed) in enumerate(asked)]


def test_it_is_one_minus_cosine_to_the_others_of_the_same_prompt(dino: DinoBackbone) -> None:
    rows = DiversityMetric(dino).score(drawn(("a dog", 0), ("a red dog", 3), ("a dog", 1), ("a dog", 2)))
    codes = dino.images([picture(seed) for seed in (0, 1, 2)])
    ab, ac, bc = (1 - float(codes[i] @ codes[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert rows[1] == {}
    got = [rows[i]["diversity"] for i in (0, 2, 3)]
    assert got == pytest.approx([(ab + ac) / 2, (ab + bc) / 2, (ac + bc) / 2], abs=1e-6)


def test_equal_pictures_have_none(dino: DinoBackbone) -> None:
    rows = DiversityMetric(dino).score(drawn(("a dog", 0), ("a dog", 0)))
    assert [row["diversity"] for row in rows] == pytest.approx([0, 0], abs=1e-6)


def test_single_pictures_and_bare_class_words_are_left_out(dino: DinoBackbone) -> None:
    assert DiversityMetric(dino).score(drawn(("a dog", 0), ("a red dog", 1))) == [{}, {}]
    bare = [Drawn(case(prompt="a dog", seed=seed), picture(seed)) for seed in range(2)]
    assert DiversityMetric(dino).score(bare) == [{}, {}]
