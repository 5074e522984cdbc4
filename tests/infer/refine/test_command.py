"""`refine` from its arguments to the file: subjects, pairs, the five ready configs; what a signal leaves behind."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data_pipeline.errors import UserError
from data_pipeline.settings import load_settings
from infer import generate
from infer.refine import command
from infer.refine.refinement import read_refinement
from infer.refine.settings import RefineSettings
from infer.refine.task import RefineTask, method_settings
from tests.infer.tiny_model import TinyModel
from train.settings import REPOSITORY

CONFIGS = ("cd_no_reg", "cd_reg", "cd_alt_reg", "ci", "ci_cd_reg")
QUICK = ('report.preview_prompts=["{}"]', "report.preview_steps=1", "report.evaluate=null")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(2):
        noise = np.random.default_rng(index).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def captioned(photos: Path) -> Path:
    for index, text in enumerate(("a dog on the beach", "a red mug")):
        (photos / f"{index}.txt").write_text(text)
    return photos


def arguments(tmp_path: Path, model: Path | str, *more: str) -> list[str]:
    place = [f"runs_dir={tmp_path / 'runs'}", f"regularisation.cache={tmp_path / 'cache'}"]
    kept = place if any(text.startswith("regularisation") for text in more) else place[:1]
    return ["--base", str(model), "--steps", "2", "--output", str(tmp_path / "z.safetensors"), *more, *kept, *QUICK[:2]]


def draw(tmp_path: Path, model: Path, *more: str) -> np.ndarray:
    settings = generate.read_settings(
        [
            "--model",
            str(model),
            "--prompt",
            "a dog on the beach",
            "--steps",
            "2",
            "--output",
            str(tmp_path / "drawn"),
            *more,
        ]
    )
    return np.array(Image.open(generate.run(settings)[0]))


@pytest.mark.parametrize("method", ["adapter", "lora", "dreambooth"])
def test_pairs_are_learnt_without_a_word_and_drawn_with(
    method: str, tiny_model: TinyModel, captioned: Path, tmp_path: Path
) -> None:
    told = arguments(tmp_path, tiny_model.subject, "--pairs", str(captioned), "options.learning_rate=0.05")
    assert command.main(["--method", method, *told]) == 0
    file = read_refinement(tmp_path / "z.safetensors")
    assert file.words == {} and file.tensors and not any(name.startswith("words.") for name in file.tensors)
    assert file.label.endswith("z.safetensors") and file.preview is not None
    without = draw(tmp_path, tiny_model.subject)
    refined = draw(tmp_path, tiny_model.subject, "--refinement", str(tmp_path / "z.safetensors"))
    assert not np.array_equal(without, refined)


def test_what_pairs_cannot_be_told_is_one_line(tiny_model: TinyModel, captioned: Path, tmp_path: Path) -> None:
    told = arguments(tmp_path, tiny_model.subject, "--pairs", str(captioned))
    with pytest.raises(
        UserError, match="pairs: lasr learns a word, and pairs have none; expected .*dreambooth, adapter"
    ):
        command.main(["--method", "lasr", *told])
    with pytest.raises(UserError, match="--images.* or .*--pairs.*not both"):
        command.main(["--method", "lora", *told, "--images", str(captioned), "--class-word", "dog"])
    with pytest.raises(UserError, match="give pictures of a subject"):
        command.main(["--method", "lora", *arguments(tmp_path, tiny_model.subject)])
    with pytest.raises(UserError, match="pairs: show no subject, so leave regularisation"):
        command.main(["--method", "lora", *told, "regularisation.kind=generated"])


def test_adapters_take_the_published_values_of_their_second_task_for_pairs(captioned: Path) -> None:
    def steps(**options: object) -> int:
        settings = RefineSettings(method="adapter", pairs=captioned, output=Path("z.safetensors"), options=options)
        return method_settings(settings).steps

    assert (steps(), steps(preset="subject"), steps(steps=7)) == (60_000, 2500, 7)


def test_a_strength_scales_what_a_file_adds(tiny_model: TinyModel, photos: Path, tmp_path: Path) -> None:
    told = arguments(tmp_path, tiny_model.subject, "--images", str(photos), "--class-word", "dog")
    command.main(["--method", "lora", *told, "--identifier", "sks", "options.learning_rate=0.05"])
    file = tmp_path / "z.safetensors"
    assert read_refinement(file).words["z"]["identifier"] == "sks"

    def drawn(strength: str) -> np.ndarray:
        more = ["--subject", f"z={file}{strength}", "--prompt", "a z dog"]
        return draw(tmp_path, tiny_model.subject, *more).astype(float)

    whole, half, none = drawn(""), drawn(":strength=0.5"), drawn(":strength=0")
    assert 0 < np.abs(half - none).mean() < np.abs(whole - none).mean()
    with pytest.raises(UserError, match="has learnt a word; give it as --subject z="):
        draw(tmp_path, tiny_model.subject, "--refinement", str(file))
    with pytest.raises(UserError, match="strength 'x' is no number"):
        draw(tmp_path, tiny_model.subject, "--refinement", f"{file}:strength=x")
    command.main(["--method", "cross-init", *told])
    with pytest.raises(UserError, match="strength 0.5: cross-init has none; only adapter and lora do"):
        drawn(":strength=0.5")


def test_a_file_of_pairs_is_no_subject(tiny_model: TinyModel, captioned: Path, tmp_path: Path) -> None:
    command.main(["--method", "lora", *arguments(tmp_path, tiny_model.subject, "--pairs", str(captioned))])
    with pytest.raises(UserError, match="was learnt from pairs, without a word; give it as --refinement"):
        draw(tmp_path, tiny_model.subject, "--subject", f"dog={tmp_path / 'z.safetensors'}")


def test_a_signal_leaves_the_checkpoint_and_the_same_command_goes_on(
    tiny_model: TinyModel, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = arguments(tmp_path, tiny_model.subject, "--images", str(photos), "--class-word", "dog")
    told = ["--method", "textual-inversion", *told]
    batch = RefineTask.batch

    def interrupted(self: RefineTask, collated):
        signal.raise_signal(signal.SIGTERM)
        return batch(self, collated)

    with monkeypatch.context() as patch:
        patch.setattr(RefineTask, "batch", interrupted)
        with pytest.raises(
            KeyboardInterrupt, match="z.safetensors: not written, a signal came first; the same command goes on"
        ):
            command.main(told)
    assert not (tmp_path / "z.safetensors").exists() and list(tmp_path.glob("runs/refine/*/checkpoints/*"))
    command.main(told)
    resumed = load_file(tmp_path / "z.safetensors")
    assert not list(tmp_path.glob("runs/refine/*/checkpoints"))
    command.main(told)
    assert torch.equal(load_file(tmp_path / "z.safetensors")["words.z"], resumed["words.z"])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_ready_config_goes_from_images_to_a_file(name: str, photos: Path, tmp_path: Path) -> None:
    config = REPOSITORY / "configs" / "refine" / f"{name}.yaml"
    images = [f'concepts.z.images=["{photos}"]', "concepts.z.class_word=dog"]
    published = load_settings(RefineSettings, [config], images)
    assert (
        published.plain
        and published.report.evaluate.metrics == ("clip", "dino")
        and published.report.evaluate.seeds == 1
    )
    own = method_settings(published)
    assert own.steps == (320 if name == "ci" else 1500) and (
        name == "ci" or (own.parts, own.learning_rate) == ("whole", 5e-6)
    )
    small = (
        ["regularisation.count=2", "regularisation.steps=1"] if name.endswith("_reg") and name != "cd_no_reg" else []
    )
    small += ["regularisation.model=toybox"] if name == "cd_alt_reg" else []
    told = arguments(
        tmp_path, "toybox", "--images", str(photos), "--class-word", "dog", *small, "options.batch_size=2", QUICK[2]
    )
    assert command.main(["--config", str(config), *told]) == 0
    file = read_refinement(tmp_path / "z.safetensors")
    assert file.method == published.method and list(file.words) == ["z"] and file.base == "toybox (plain)"
    assert len(list(tmp_path.glob("cache/*/*.png"))) == (2 if small else 0)


def test_the_loop_is_told_the_methods_schedule(photos: Path) -> None:
    def told(method: str, **options: object) -> tuple[object, ...]:
        concepts = {"z": {"images": [photos], "class_word": "dog"}}
        settings = RefineSettings(method=method, concepts=concepts, output=Path("z.safetensors"), options=options)
        optimizer = command.run_settings(settings, method_settings(settings)).optimizer
        return optimizer.learning_rate, optimizer.warmup_steps, optimizer.decay, optimizer.decay_to, optimizer.groups

    assert told("lasr") == (1e-3, 500, "cosine", 0.2, {})
    assert told("custom-diffusion", word_rate=20) == (1e-5, 0, "constant", 0.0, {r"learned\..*": 20.0})


def test_scores_come_at_the_end_where_they_are_asked_for() -> None:
    settings = load_settings(
        RefineSettings,
        [REPOSITORY / "configs" / "refine" / "ci.yaml"],
        [
            'concepts.z={"images": ["."], "class_word": "dog"}',
            "report.evaluate.metrics=[clip]",
            "report.evaluate.seeds=3",
        ],
    )
    assert settings.report.evaluate.model_dump() == {"metrics": ("clip",), "prompts": None, "seeds": 3}
    with pytest.raises(UserError, match="metrics"):
        load_settings(
            RefineSettings, [], ["method=lora", "output=z.safetensors", "pairs=.", "report.evaluate.metrics=[]"]
        )
