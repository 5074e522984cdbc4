"""Rows that are tuned to each subject: tuned once, nothing of one subject left for the next, a killed run goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.errors import UserError
from infer.evaluate.cases import Case, EvaluatedSubject, Photo
from infer.evaluate.methods import Answer, MethodPlan, create, plan_methods
from infer.evaluate.methods.refined import Refined, with_things
from infer.evaluate.settings import EvaluateSettings
from infer.refine.method import RefineBatch
from infer.refine.refinement import read_refinement
from infer.refine.samples import CollatedSamples
from infer.refine.task import RefineTask
from tests.infer.evaluate.small_cases import picture
from tests.infer.tiny_model import TinyModel

Configure = Callable[..., EvaluateSettings]


@pytest.fixture
def configure(tmp_path: Path, tiny_model: TinyModel) -> Configure:
    """configure(method, **refine) -> a configuration with one row that learns for two steps and draws with two."""

    def build(method: str = "textual-inversion", **said: Any) -> EvaluateSettings:
        learnt = {"steps": 2, "learning_rate": 0.5, "batch_size": 1}
        refine = {"method": method, "model": str(tiny_model.subject), "options": learnt, **said}
        row = {"kind": "refined", "refine": refine, "images": 2, "steps": 2, "guidance": "joint"}
        return EvaluateSettings.model_validate(
            {"name": "tiny", "output": tmp_path, "protocol": {"kind": "folder"}, "methods": {"it": row}}
        )

    return build


def thing(noun: str, seed: int, photos: int = 3) -> EvaluatedSubject:
    shown = tuple(Photo(f"{noun} {i}", lambda i=i: picture(seed + i, 64, 64)) for i in range(photos))  # type: ignore[misc]
    return EvaluatedSubject(noun, noun, shown, tuning=shown)


DOG, CAT = thing("dog", 0), thing("cat", 10)


def case(prompt: str, *subjects: EvaluatedSubject, seed: int = 0, tuned_to: tuple[EvaluatedSubject, ...] = ()) -> Case:
    part = ("class", "single", "pair")[len(subjects)]
    words = tuple(subject.noun for subject in subjects)
    return Case(
        f"{prompt}{seed}",
        "+".join(words) or "class",
        part,
        prompt,
        "new scene",
        seed,
        subjects,
        words,
        tuned_to=tuned_to,
    )  # type: ignore[arg-type]


def plan_of(run: EvaluateSettings) -> MethodPlan:
    return plan_methods(run)[0]


def opened(run: EvaluateSettings) -> Refined:
    method = create(plan_of(run), run)
    assert isinstance(method, Refined)
    return method


def drawn(method: Refined, one: Case) -> np.ndarray:
    (answer,) = method.draw([one])
    assert isinstance(answer, Answer) and answer.boxes is None
    return np.asarray(answer.picture, int)


def test_a_subject_is_tuned_once_and_its_file_drawn_with(configure: Configure) -> None:
    one, bare = case("a dog on the beach", DOG), opened(configure())
    untold = drawn(bare, one)
    first = bare.prepare([DOG])
    shown, model = drawn(bare, one), bare.model
    (file,) = bare.folder.glob("*.safetensors")
    when = file.stat().st_mtime_ns
    assert (first.pictures, first.kept_bytes) == (2, file.stat().st_size) and first.seconds > 0
    assert read_refinement(file).words["z"]["class_word"] == "dog"
    assert [np.asarray(Image.open(bare.folder / "dog" / f"{i}.png")).shape for i in range(2)] == [(64, 64, 3)] * 2
    assert np.abs(shown - untold).max() > 2

    again = opened(configure())  # after a kill
    assert again.prepare([DOG]) == first and file.stat().st_mtime_ns == when
    assert again.model == model and np.array_equal(drawn(again, one), shown)


def test_a_signal_during_tuning_ends_the_evaluation_and_is_no_hole(
    configure: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = RefineTask.batch

    def terminated(self: RefineTask, collated: CollatedSamples) -> RefineBatch:
        signal.raise_signal(signal.SIGTERM)
        return batch(self, collated)

    run = configure()
    with monkeypatch.context() as patch:
        patch.setattr(RefineTask, "batch", terminated)
        with pytest.raises(KeyboardInterrupt, match="the same command goes on there"):
            opened(run).prepare([DOG])
    assert opened(run).prepare([DOG]).kept_bytes, "goes on from the checkpoint"


def test_nothing_of_a_subject_is_left_for_the_next(configure: Configure) -> None:
    one, run = case("a cat on the beach", CAT), configure("dreambooth")
    alone = opened(run)
    alone.prepare([CAT])
    after = opened(run)
    after.prepare([DOG])
    after.prepare([CAT])
    assert after.model == alone.model and np.array_equal(drawn(after, one), drawn(alone, one))


def test_two_subjects_meet_in_two_files_that_were_tuned_apart(configure: Configure) -> None:
    method = opened(configure("lora"))
    method.prepare([DOG, CAT])
    assert method.things == {"dog": "z dog", "cat": "y cat"}
    assert method._prompt(case("a dog and a cat", DOG, CAT)) == "a z dog and a y cat"
    assert sorted(file.stem for file in method.folder.glob("*.safetensors")) == ["cat", "dog"]
    both = drawn(method, case("a dog and a cat", DOG, CAT))
    method.prepare([DOG])
    assert np.abs(both - drawn(method, case("a dog and a cat", DOG))).max() > 2


def test_subjects_refined_with_references_stand_where_they_are_asked_for(configure: Configure) -> None:
    method = opened(configure("lora", references=1))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 8, 48, 56))
    told = [tuple(replace(photo, mask=lambda: mask) for photo in one.tuning) for one in (DOG, CAT)]
    method.prepare([replace(one, tuning=photos) for one, photos in zip((DOG, CAT), told, strict=True)])
    boxes = ((0.1, 0.1, 0.5, 0.5), (0.5, 0.5, 0.9, 0.9))
    both = case("a cat and a dog", CAT, DOG)
    (placed,) = method.draw([replace(both, boxes=boxes)])
    (anywhere,) = method.draw([both])
    assert placed.boxes == boxes and anywhere.boxes is not None and anywhere.boxes != boxes
    assert np.abs(np.asarray(placed.picture, int) - np.asarray(anywhere.picture, int)).max() > 2
    (bare,) = method.draw([case("a mug", tuned_to=(DOG,))])
    assert bare.boxes is None


def test_class_words_are_drawn_with_the_tuned_weights_and_without_the_word(configure: Configure) -> None:
    word = case("a dog", tuned_to=(DOG,))
    for method, drifts in (("textual-inversion", False), ("dreambooth", True)):
        run = configure(method)
        assert plan_of(run).answers(word) and not plan_of(run).answers(case("a dog"))
        tuned = opened(run)
        before = drawn(tuned, word)
        tuned.prepare(word.prepared_for)
        assert (np.abs(drawn(tuned, word) - before).max() > 2) == drifts


def test_methods_whose_files_cannot_be_joined_have_no_answer_to_pairs(configure: Configure) -> None:
    pair = case("a dog and a cat", DOG, CAT)
    assert plan_of(configure("lora")).answers(pair) and not plan_of(configure("dreambooth")).answers(pair)
    for parts, joins in (("kv", True), ("whole", False)):  # the closed form merges keys and values
        assert plan_of(configure("custom-diffusion", options={"parts": parts})).answers(pair) == joins


def test_what_a_subject_is_called_takes_the_place_of_its_word() -> None:
    assert with_things("an owl in the snow", [(3, 6)], ["z owl"]) == "a z owl in the snow"
    assert with_things("An animal and a cat", [(3, 9), (16, 19)], ["z", "y"]) == "A z and a y"
    assert with_things("red socks", [(4, 9)], ["z socks"]) == "red z socks"


def test_the_row_says_what_is_learnt_and_where_it_is_drawn(configure: Configure, tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text("method: lora\nplain: true\noptions: {rank: 2, steps: 9}\nreport: {log_every: 5}\n")
    run = configure().model_copy(
        update={"methods": {"it": {"kind": "refined", "refine": {"config": str(preset), "options": {"steps": 3}}}}}
    )
    told = plan_of(run).resolved()
    assert told["refine"] == {"method": "lora", "plain": True, "options": {"rank": 2, "steps": 3}}
    assert told["plain"] and told["model"] == "toybox"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"refine": {"method": "lasso"}}, "refine: method='lasso'"),
        ({"refine": {"method": "lora", "options": {"rnk": 1}}}, "options: unknown key rnk; did you mean rank?"),
        ({"refine": {"method": "lora", "plain": True}, "plain": False}, "plain=False: subjects are drawn as they are"),
        ({}, "expected `refine`, how subjects are learnt, or `file`, what was learnt"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_loaded(
    configure: Configure, row: dict[str, Any], told: str
) -> None:
    run = configure().model_copy(update={"methods": {"it": {"kind": "refined", **row}}})
    with pytest.raises(UserError) as error:
        plan_methods(run)
    assert told in str(error.value)


def test_a_protocol_without_pictures_to_tune_from_is_told(configure: Configure) -> None:
    bare = EvaluatedSubject("dog", "dog", DOG.photos)
    with pytest.raises(UserError, match="subject dog: no pictures to tune to it; say protocol.tuning_photos=4"):
        opened(configure()).prepare([bare])
