"""Refinements that are learnt, and drawn, with photos shown besides: samples, losses, the file, `generate`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.errors import UserError
from data_pipeline.settings import settings_of
from infer import generate
from infer.picture_file import read_record
from infer.pipeline import SubjectDiffusionPipeline
from infer.refine import command
from infer.refine.install import install_refinements
from infer.refine.methods import METHODS, load_method
from infer.refine.methods.lasr import METHOD as LASR
from infer.refine.methods.lasr import LasrSettings
from infer.refine.references import draw_references, shown_cutouts
from infer.refine.refinement import read_refinement, rename_placeholders, write_refinement
from infer.refine.samples import RefineSamples
from infer.refine.settings import RefineSettings
from infer.refine.subject_images import SubjectPicture, VariationSettings, vary
from infer.refine.words import prompt_inputs
from infer.subjects import Subject, with_mentioned
from tests.infer.refine.tiny_base import concept, loss_of, pictures, refinement_of, tiny_base, tiny_batch, tune
from tests.infer.tiny_model import TinyModel

BOX = (0.25, 0.25, 0.75, 0.75)


def shown(word: str = "z", number: int = 1) -> Subject:
    cutouts = [Image.fromarray(picture.rgba) for picture in pictures(number)]
    return Subject("dog", cutouts, BOX, word=word)


def draw(pipeline: SubjectDiffusionPipeline, prompt: str, subjects: Any = None) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    return pipeline(prompt, subjects, num_inference_steps=2, output_type="latent", generator=seed).images


def test_a_sample_is_shown_other_pictures_than_its_own_while_there_are_any() -> None:
    drawn = [draw_references(1, 3, 2, np.random.default_rng(seed)) for seed in range(40)]
    assert {frozenset(one) for one in drawn} == {frozenset((0, 2))} and len(set(drawn)) == 2
    assert {draw_references(0, 1, 1, np.random.default_rng(seed)) for seed in range(4)} == {(0,)}
    assert set(draw_references(1, 3, 3, np.random.default_rng(0))) == {0, 1, 2}


def test_showing_pictures_changes_nothing_else_about_a_sample() -> None:
    def samples(references: int) -> RefineSamples:
        varied = VariationSettings(shrink=0.5, shrink_to=0.4)
        return RefineSamples([concept()], ["z"], ["a {}", "the {}"], varied, 3, references=references)

    for number in range(8):
        alone, beside = samples(0)[number], samples(1)[number]
        assert torch.equal(alone.pixels, beside.pixels) and alone.prompt == beside.prompt and alone.shown is None
        assert beside.shown is not None and beside.shown.concept == 0 and len(beside.shown.pictures) == 1
        assert beside == replace(alone, pixels=beside.pixels, valid=beside.valid, shown=beside.shown)


@pytest.mark.parametrize("more", [{}, {"flip": 1.0}, {"shrink": 1.0, "shrink_to": 0.5}, {"shrink": 0, "enlarge": 1.0}])
def test_a_sample_knows_where_its_subject_went(more: dict[str, float]) -> None:
    rgba = np.full((40, 40, 4), 255, np.uint8)
    subject = np.zeros((40, 40), np.uint8)
    rgba[6:18, 4:30], subject[6:18, 4:30] = [0, 0, 255, 255], 255
    picture = SubjectPicture(Path("a.png"), rgba, subject)
    for seed in range(6):
        settings = VariationSettings(**({"flip": 0.0} | more))
        varied = vary(picture, settings, np.random.default_rng(seed))
        is_blue = (varied.pixels[2] - varied.pixels[0] > 0.5).numpy()
        rows, columns = np.flatnonzero(is_blue.any(axis=1)), np.flatnonzero(is_blue.any(axis=0))
        seen = (columns[0] / 40, rows[0] / 40, (columns[-1] + 1) / 40, (rows[-1] + 1) / 40)
        assert varied.box == pytest.approx(seen, abs=0.03)
    assert vary(replace(picture, subject=None), settings, np.random.default_rng(0)).box is None


def test_only_a_subject_with_as_many_pictures_can_be_shown() -> None:
    assert shown_cutouts(concept(), 0) == []
    assert [one.mode for one in shown_cutouts(concept(), 2)] == ["RGBA", "RGBA"]
    rgba = np.full((24, 24, 4), 200, np.uint8)
    rgba[:8, :, 3] = 0  # a background that is hidden, but there
    (cutout,) = shown_cutouts(replace(concept(), pictures=[SubjectPicture(Path("a.png"), rgba)]), 1)
    assert not np.array(cutout)[:8].any() and np.array(cutout)[8:].all()
    with pytest.raises(UserError, match=r"references=3: 'z' has 2 picture\(s\); give more, or show fewer"):
        shown_cutouts(concept(), 3)
    with pytest.raises(UserError, match="references=1: a style is no subject"):
        shown_cutouts(replace(concept(), kind="style"), 1)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"concepts": {"z": {"images": ["x"], "class_word": "dog"}}, "plain": True}, "a plain base cannot look"),
        ({"pairs": "x"}, "pairs show no subject"),
    ],
)
def test_where_nothing_can_be_shown_the_settings_say_so(said: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=f"references=1: {why}"):
        settings_of(RefineSettings, {"method": "lora", "output": "z.safetensors", "references": 1, **said}, "refine")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_with_the_pictures_in_sight(method: str, tiny_model: TinyModel) -> None:
    base, made = tiny_base(tiny_model), load_method(method)
    torch.manual_seed(0)
    said = {"identifier": "sks"} if "identifier" in made.settings.model_fields else {}
    module = made.build(base, [concept()], settings_of(made.settings, said, "options"))
    thing = made.thing(concept(), None)
    alone, beside = (tiny_batch(f"a {thing} on grass", shown=one) for one in (None, shown()))
    assert not torch.isclose(loss_of(module, alone)[1]["denoising"], loss_of(module, beside)[1]["denoising"])
    losses = tune(module, beside, 6, 1e-3)
    assert losses[-1] < losses[0]


def test_what_is_shown_in_training_is_shown_in_drawing(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    torch.manual_seed(0)
    LASR.build(base, [concept()], LasrSettings())
    pipeline = base.pipeline
    inputs = prompt_inputs(pipeline, ["a z on grass"], [shown()])
    assert inputs.subject_keep.all() and inputs.location_keep.all()
    assert torch.allclose(inputs.boxes, torch.tensor([[BOX]]))
    nowhere = prompt_inputs(pipeline, ["a z on grass"], [replace(shown(), box=None)])
    assert nowhere.subject_keep.all() and not nowhere.location_keep.any()

    given = draw(pipeline, "a z on grass", [shown()])
    plain = draw(pipeline, "a z on grass")
    pipeline.references = (shown(),)
    assert torch.equal(draw(pipeline, "a z on grass"), given) and not torch.allclose(given, plain, atol=1e-3)
    assert torch.equal(draw(pipeline, "a z on grass", [shown()]), given)  # not twice
    assert draw(pipeline, "a mug on grass").isfinite().all()


def test_the_class_prompts_of_the_composition_loss_see_the_pictures_too(tiny_model: TinyModel) -> None:
    base = tiny_base(tiny_model)
    torch.manual_seed(0)
    module, pipeline = LASR.build(base, [concept()], LasrSettings()), base.pipeline
    states = module._class_states(prompt_inputs(pipeline, ["a z on grass"], [shown()]))[:, 0]
    named = prompt_inputs(pipeline, ["a dog on grass"], [replace(shown(), word=None)])
    assert torch.allclose(states, pipeline.subject_model.encode(named, (8, 8))[0], atol=1e-5)
    assert all(value.isfinite() for value in loss_of(module, tiny_batch("a z on grass", shown=shown()))[1].values())


def test_each_mention_that_is_left_takes_a_picture() -> None:
    z, y = shown("z"), shown("y")
    assert with_mentioned("a Z hugging a y, z", (), [z, y]) == [z, z, y]
    assert with_mentioned("a z and a zebra", (), [z, y]) == [z]
    own = replace(z, box=(0, 0, 0.5, 0.5))
    assert with_mentioned("a z and a z", [own], [z, y]) == [own, z]


def test_the_file_holds_the_pictures_and_brings_them_along(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_base(tiny_model)
    torch.manual_seed(0)
    module = LASR.build(base, [concept()], LasrSettings())
    made = refinement_of("lasr", module, concept())
    cutouts = tuple(shown(number=2).references)
    file = tmp_path / "z.safetensors"
    write_refinement(replace(made, references={"z": cutouts}), file)
    read = read_refinement(file)
    tensors = made.tensors | {"references.000.z": torch.zeros(9, dtype=torch.uint8)}
    write_refinement(replace(made, tensors=tensors), tmp_path / "broken.safetensors")
    with pytest.raises(UserError, match=r"broken\.safetensors: the picture references\.000\.z in it cannot be read"):
        read_refinement(tmp_path / "broken.safetensors")
    assert [np.array(one).tolist() for one in read.references["z"]] == [np.array(one).tolist() for one in cutouts]
    assert read.tensors.keys() == made.tensors.keys() and read.digest() != made.digest()
    (told,) = rename_placeholders(read, [("z", "y")]).subjects()
    assert (told.said, told.noun, len(told.references)) == ("y", "dog", 2)

    pipelines = [SubjectDiffusionPipeline.from_pretrained(tiny_model.subject) for _ in range(2)]
    for pipeline, references in zip(pipelines, (read.references, {}), strict=True):
        install_refinements(pipeline, [replace(read, references=references)], "tiny")
    assert not torch.allclose(*(draw(pipeline, "a z on grass") for pipeline in pipelines), atol=1e-3)


def test_from_photos_to_a_picture_on_the_command_line(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, picture in enumerate(pictures(3, 64)):
        Image.fromarray(picture.rgba).save(photos / f"{number}.png")
    file = tmp_path / "z.safetensors"
    told = ["--method", "lora", "--images", str(photos), "--class-word", "dog", "--identifier", "sks", "--steps", "2"]
    place = ["--base", str(tiny_model.subject), "--output", str(file), f"runs_dir={tmp_path}", "report.preview_steps=1"]
    assert command.main([*told, *place, "--references", "2", "workers=0"]) == 0
    assert len(read_refinement(file).references["z"]) == 2

    def drawn(*more: str) -> Path:
        said = ["--model", str(tiny_model.subject), "--prompt", "a z dog", "--steps", "2", "--output", str(tmp_path)]
        return generate.run(generate.read_settings([*said, *more]))[0]

    (subject,) = read_record(drawn("--subject", f"z={file}@0.1,0.2,0.6,0.8")).subjects
    assert subject["box"] == [0.1, 0.2, 0.6, 0.8]
    (anywhere,) = read_record(drawn("--subject", f"z={file}:strength=0.5")).subjects
    assert anywhere["box"] is not None and anywhere["strength"] == 0.5

    command.main([*told, *place])
    with pytest.raises(UserError, match="z: .*cannot be given a box; only one subject, refined with references, can"):
        drawn("--subject", f"z={file}@0.1,0.2,0.6,0.8")
    with pytest.raises(UserError, match=r"references=4: 'z' has 3 picture\(s\)"):
        command.main([*told, *place, "--references", "4"])
