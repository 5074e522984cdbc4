"""Methods: the same case always gets the same picture, settings are checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.errors import UserError
from infer.drawing import DrawSettings
from infer.evaluate.backbones import as_picture
from infer.evaluate.cases import Case, EvaluatedSubject, Photo
from infer.evaluate.methods import Method, create, plan_methods
from infer.evaluate.settings import EvaluateSettings
from infer.pipeline import SubjectDiffusionPipeline
from infer.subjects import Subject
from tests.infer.tiny_model import TinyModel

Configure = Callable[..., EvaluateSettings]


@pytest.fixture
def configure(tmp_path: Path, tiny_model: TinyModel) -> Configure:
    """configure(kind, **values) -> a configuration with one method `it` of two steps."""

    def build(kind: str, sweeps: dict[str, object] | None = None, **values: object) -> EvaluateSettings:
        return EvaluateSettings.model_validate(
            {
                "name": "tiny",
                "output": tmp_path,
                "protocol": {"kind": "folder"},
                "methods": {"it": {"kind": kind, **values}},
                "sweeps": sweeps or {},
            }
        )

    return build


@pytest.fixture
def cases(cutout: Callable[..., Image.Image]) -> list[Case]:
    photos = tuple(Photo(f"dog {i}", lambda i=i: cutout(i)) for i in range(3))  # type: ignore[misc]
    dog = EvaluatedSubject("dog", "dog", photos)
    prompts = ("a dog on the beach", "a dog in the snow", "a dog by the lake")
    box = ((0.1, 0.2, 0.6, 0.7),)
    return [
        Case(f"dog--{i}", "dog", "single", prompt, "new scene", i, (dog,), ("dog",), box if i else None)
        for i, prompt in enumerate(prompts)
    ]


def only(run: EvaluateSettings) -> Method:
    return create(plan_methods(run)[0], run)


def same(first: Image.Image, second: Image.Image, tolerance: int = 0) -> bool:
    return int(np.abs(np.asarray(first, int) - np.asarray(second, int)).max()) <= tolerance


def test_zero_shot_draws_what_the_pipeline_draws(
    configure: Configure, cases: list[Case], tiny_model: TinyModel, loaded_pipeline: SubjectDiffusionPipeline
) -> None:
    run = configure("zero_shot", model=str(tiny_model.subject), steps=2, guidance="joint")
    (answer,) = only(run).draw(cases[1:2])
    direct = loaded_pipeline(
        "a dog in the snow",
        [Subject("dog", cases[1].subjects[0].cutouts, box=(0.1, 0.2, 0.6, 0.7))],
        **DrawSettings(steps=2, guidance="joint").call_arguments(),
        generator=torch.Generator().manual_seed(1),
    ).images[0]
    assert same(answer.picture, direct) and answer.boxes == ((0.1, 0.2, 0.6, 0.7),)


def test_zero_shot_tells_the_places_that_the_seeded_layout_chose(
    configure: Configure, cases: list[Case], tiny_model: TinyModel
) -> None:
    method = only(configure("zero_shot", model=str(tiny_model.subject), steps=2))
    (answer,) = method.draw(cases[:1])
    assert cases[0].boxes is None and answer.boxes is not None and len(answer.boxes) == 1


def test_without_references_only_the_text_speaks(
    configure: Configure, cases: list[Case], tiny_model: TinyModel, loaded_pipeline: SubjectDiffusionPipeline
) -> None:
    run = configure("zero_shot", model=str(tiny_model.subject), steps=2, references=False)
    (answer,) = only(run).draw(cases[1:2])
    direct = loaded_pipeline(
        cases[1].prompt, **DrawSettings(steps=2).call_arguments(), generator=torch.Generator().manual_seed(1)
    ).images[0]
    assert same(answer.picture, direct) and answer.boxes is None


def test_a_picture_depends_on_its_own_seed_and_not_on_its_neighbours(
    configure: Configure, cases: list[Case], tiny_model: TinyModel
) -> None:
    for run in (
        configure("zero_shot", model=str(tiny_model.subject), steps=2),
        configure("plain_base", base=str(tiny_model.base), steps=2),
    ):
        method = only(run)
        together, alone = method.draw(cases), [method.draw([case])[0] for case in cases]
        assert all(same(a.picture, b.picture, tolerance=2) for a, b in zip(together, alone, strict=True))
        assert not same(together[1].picture, together[2].picture, tolerance=2)


def test_the_sampler_of_one_row_does_not_leak_into_the_next(
    configure: Configure, cases: list[Case], tiny_model: TinyModel
) -> None:
    values = {"model": str(tiny_model.subject), "steps": 4}
    before = only(configure("zero_shot", **values)).draw(cases[:1])[0].picture
    other = only(configure("zero_shot", scheduler="euler_ancestral", **values)).draw(cases[:1])[0].picture
    after = only(configure("zero_shot", **values)).draw(cases[:1])[0].picture
    assert same(before, after) and not same(before, other, tolerance=2)


def test_the_copied_reference_is_the_photo_or_the_cut_out_on_grey(configure: Configure, cases: list[Case]) -> None:
    method = only(configure("copied_reference", size=40))
    (shown,) = method.draw(cases[:1])
    assert shown.picture.size == (40, 40) and shown.picture.getpixel((0, 0)) == (127, 127, 127)
    assert shown.boxes is not None and shown.boxes[0] == pytest.approx((0.05, 0.05, 0.95, 0.95))
    photo = Image.new("RGB", (80, 60), "teal")
    subject = EvaluatedSubject("cup", "cup", (Photo("cup", lambda: photo),))
    case = Case("cup", "cup", "single", "a cup", "new scene", 0, (subject,), ("cup",))
    assert method.draw([case])[0].picture.size == (40, 30)


def test_the_real_picture_is_one_that_no_method_was_given(configure: Configure, cases: list[Case]) -> None:
    run = configure("real_render")
    method = only(run)
    shown = [answer.picture for answer in method.draw(cases)]
    photos = [as_picture(photo).tobytes() for photo in cases[0].subjects[0].photos]
    assert [picture.tobytes() for picture in shown] == [photos[i] for i in (1, 2, 1)]
    plan = plan_methods(run)[0]
    alone = EvaluatedSubject("dog", "dog", cases[0].subjects[0].photos[:1])
    assert plan.answers(cases[0])
    assert not plan.answers(Case("x", "dog", "single", "a dog", "new scene", 0, (alone,), ("dog",)))


def test_the_real_picture_may_pass_the_autoencoder(
    configure: Configure, cases: list[Case], tiny_model: TinyModel
) -> None:
    (answer,) = only(configure("real_render", decode_with=str(tiny_model.base))).draw(cases[:1])
    assert answer.picture.size == (64, 64)


def test_every_value_of_a_sweep_is_a_row_of_its_own(configure: Configure, cases: list[Case]) -> None:
    run = configure("zero_shot", sweeps={"text": {"method": "it", "key": "guidance_scale", "values": [1.5, 8]}})
    rows = plan_methods(run)
    assert [row.name for row in rows] == ["it", "it, guidance_scale 1.5", "it, guidance_scale 8"]
    assert [row.resolved()["guidance_scale"] for row in rows] == [7.5, 1.5, 8.0]
    assert rows[1].sweep == ("text", "guidance_scale", 1.5) and rows[1].groups == 8
    word = Case("c", "class", "class", "a dog", "new scene", 0, (), ())
    assert rows[0].answers(word) and not rows[1].answers(word)


def test_a_configuration_file_of_generate_is_an_overlay(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "few.yaml").write_text("steps: 7\nguidance: joint\n")
    run = configure("zero_shot", config=str(tmp_path / "few.yaml"), guidance="none")
    settings = plan_methods(run)[0].resolved()
    assert (settings["steps"], settings["guidance"]) == (7, "none")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"kind": "zero_shoot"}, "methods.it.kind='zero_shoot': no such kind of method; expected one of zero_shot, "),
        ({"kind": "zero_shot", "stepz": 3}, "methods.it: unknown key stepz; did you mean steps?"),
        ({"kind": "zero_shot", "steps": 0}, "methods.it: steps=0: input should be greater than or equal to 1"),
        ({"kind": "plain_base"}, "base: missing"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_loaded(
    configure: Configure, values: dict[str, object], told: str
) -> None:
    with pytest.raises(UserError, match=r"^.*") as error:
        plan_methods(configure(**values))  # type: ignore[arg-type]
    assert str(error.value).startswith(told)


def test_a_method_without_weights_is_told_in_one_line(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder, shipped model or hub id"):
        only(configure("zero_shot", model="nowhere"))
    with pytest.raises(UserError, match="base gone"):
        only(configure("plain_base", base="gone"))
