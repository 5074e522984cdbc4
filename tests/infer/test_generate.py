"""`subject-diffusion generate` from the command line: what it writes, and what it says when something is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from infer.cli import main
from infer.generate import GenerateSettings, read_settings
from infer.picture_file import read_record
from infer.pipeline import SubjectDiffusionPipeline
from tests.infer.tiny_model import TinyModel

Command = Callable[..., list[str]]


@pytest.fixture
def dog(tmp_path: Path, cutout: Callable[..., Image.Image]) -> Path:
    cutout().save(tmp_path / "dog.png")
    return tmp_path / "dog.png"


@pytest.fixture
def command(tiny_model: TinyModel, tmp_path: Path, dog: Path) -> Command:
    """command(*words) -> a complete call of two steps; later words win."""

    def build(*words: str) -> list[str]:
        return [
            *("generate", "--model", str(tiny_model.subject), "--prompt", "a dog on the beach"),
            *("--output", str(tmp_path / "out"), "--steps", "2"),
            *(words if "--subject" in words else ("--subject", f"dog={dog}", *words)),
        ]

    return build


def test_the_path_of_the_first_picture_is_the_last_line(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command("--num-images", "2")) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == str(tmp_path / "out" / "00000.png") and Image.open(last).size == (64, 64)


def test_pictures_count_on_and_nothing_is_overwritten(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "out"
    main(command("--num-images", "2", "--grid"))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    main(command("--seed", "5", "--grid"))
    assert all(file.read_bytes() == content for file, content in before.items())
    assert sorted(file.name for file in out.iterdir()) == [
        *("00000.png", "00000.yaml", "00001.png", "00002.png", "00002.yaml"),
        *("cutouts", "grid-00002.png", "grid.png"),
    ]
    assert len(list((out / "cutouts").iterdir())) == 1


def test_the_picture_says_how_it_was_made(command: Command, tmp_path: Path, dog: Path, tiny_model: TinyModel) -> None:
    main(command("--subject", f"dog={dog}@0.1,0.2,0.6,0.7:strength=0.5", "--seed", "9", "--num-images", "2"))
    record = read_record(tmp_path / "out" / "00001.png")
    assert (record.prompt, record.seed) == ("a dog on the beach", 10)
    assert record.subjects[0] == {
        "noun": "dog",
        "occurrence": None,
        "files": [str(dog)],
        "box": [0.1, 0.2, 0.6, 0.7],
        "strength": 0.5,
    }
    assert record.model == SubjectDiffusionPipeline.from_pretrained(tiny_model.subject).fingerprint()
    assert GenerateSettings.model_validate(record.settings).steps == 2


def test_the_written_settings_draw_the_same_pictures_again(command: Command, tmp_path: Path) -> None:
    main(command("--seed", "3"))
    assert main(["generate", "--config", str(tmp_path / "out" / "00000.yaml")]) == 0
    first, second = (Image.open(tmp_path / "out" / f"0000{k}.png").tobytes() for k in range(2))
    assert first == second


def test_a_picture_is_the_same_alone_and_among_others(command: Command, tmp_path: Path) -> None:
    main(command("--seed", "0", "--num-images", "3"))
    main(command("--seed", "2"))
    third, alone = (Image.open(tmp_path / "out" / f"0000{k}.png").tobytes() for k in (2, 3))
    assert third == alone


def test_several_subjects_references_and_a_photo_without_alpha_work_together(
    command: Command, tmp_path: Path, dog: Path, cutout: Callable[..., Image.Image]
) -> None:
    photo = Image.new("RGB", (60, 60), (20, 120, 40))
    photo.paste((220, 40, 40), (18, 18, 42, 42))
    photo.save(tmp_path / "mug.jpg")
    words = ["--subject", f"dog#2={dog},{dog}", "--subject", f"mug={tmp_path / 'mug.jpg'}"]
    words += ["--subject", f"dog={dog}", "--prompt", "a dog, a dog and a mug", "--guidance", "joint", "--grid"]
    assert main(command(*words)) == 0
    assert len(list((tmp_path / "out" / "cutouts").iterdir())) == 2


def test_without_subjects_it_draws_plain_text_to_image(tiny_model: TinyModel, tmp_path: Path) -> None:
    words = ["generate", "--model", str(tiny_model.subject), "--prompt", "the beach", "--output", str(tmp_path)]
    assert main([*words, "steps=1", "--size", "32x64"]) == 0
    assert Image.open(tmp_path / "00000.png").size == (32, 64)


def test_options_win_over_files_and_keys_over_options(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("prompt: a\nsteps: 3\nseed: 1\n")
    (tmp_path / "b.yaml").write_text("steps: 4\n")
    settings = read_settings(
        [*("--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")), "--seed", "2", "seed=3"]
    )
    assert (settings.prompt, settings.steps, settings.seed) == ("a", 4, 3)


def test_a_prompt_may_hold_any_characters(tmp_path: Path) -> None:
    prompt = 'a "dog": {x}, #1 – ü 🐕 & more'
    assert read_settings(["--prompt", prompt]).prompt == prompt


def test_the_shipped_settings_are_valid_and_name_the_shipped_model() -> None:
    assert read_settings(["--prompt", "a dog"]).model == "toybox"


def test_a_progress_bar_is_shown(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    main(command())
    assert "2/2" in capsys.readouterr().err


def wrong_file(path: Path) -> list[str]:
    return ["--subject", f"dog={path / 'absent.png'}"]


def no_image(path: Path) -> list[str]:
    (path / "text.png").write_text("no image in here")
    return ["--subject", f"dog={path / 'text.png'}"]


def empty_cutout(path: Path) -> list[str]:
    Image.new("RGBA", (32, 32)).save(path / "empty.png")
    return ["--subject", f"dog={path / 'empty.png'}"]


def no_model(path: Path) -> list[str]:
    (path / "folder").mkdir()
    return ["--model", str(path / "folder")]


def damaged_model(path: Path) -> list[str]:
    (path / "folder").mkdir()
    (path / "folder" / "subject_model.json").write_text("{}")
    return ["--model", str(path / "folder")]


def unknown_key_in_a_file(path: Path) -> list[str]:
    (path / "bad.yaml").write_text("guidance_scal: 3\n")
    return ["--config", str(path / "bad.yaml")]


def output_is_a_file(path: Path) -> list[str]:
    (path / "taken").touch()
    return ["--output", str(path / "taken")]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (wrong_file, "absent.png: no such file"),
        (no_image, "text.png: not a picture"),
        (empty_cutout, "empty.png: empty cut-out"),
        (["--prompt", "a cat on the beach"], "lacks the word 'dog'"),
        (["--prompt", ""], "prompt"),
        (["--subject", "dog#2={dog}"], "dog#2"),
        (["--subject", "dog={dog}@0,0,1.2,1"], "leaves the picture"),
        (["--subject", "dog={dog}@0.5,0,0.2,1"], "upside down"),
        (["--subject", "dog={dog}:strength=7"], "strength 7"),
        (["--subject", "dog"], "expected NAME=FILE"),
        (["--prompt", "a dog is <subject>"], "reserved token <subject>"),
        (["--prompt", "a dog " * 30], "prompt too long"),
        (["--negative-prompt", "word " * 60], "too long"),
        (["--stepz", "3"], "unknown option --stepz; did you mean --steps?"),
        (["--steps", "many"], "--steps"),
        (["--guidance", "both"], "--guidance"),
        (["stepz=3"], "unknown key stepz; did you mean steps?"),
        (["on", "the", "beach"], "unexpected 'on'"),
        (["steps=-1"], "steps"),
        (unknown_key_in_a_file, "bad.yaml: unknown key guidance_scal; did you mean guidance_scale?"),
        (["--config", "absent.yaml"], "absent.yaml"),
        (["--size", "60"], "multiples of 8"),
        (["--size", "big"], "--size big"),
        (["--device", "abacus"], "device abacus"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--model", "no such model"], "no such model"),
        (no_model, "folder"),
        (damaged_model, "folder"),
        (output_is_a_file, "taken: cannot be written"),
    ],
)
def test_a_mistake_gives_one_line_and_exit_code_two(
    words: list[str] | Callable[[Path], list[str]],
    complaint: str,
    command: Command,
    tmp_path: Path,
    dog: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # "without network", at once
    given = words(tmp_path) if callable(words) else [word.replace("{dog}", str(dog)) for word in words]
    assert main(command(*given)) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and complaint in lines[0]


def test_a_mistake_leaves_no_picture_behind(command: Command, tmp_path: Path) -> None:
    main(command("--size", "60"))
    assert not list((tmp_path / "out").glob("*.png"))


def test_the_resolved_settings_are_plain_yaml(command: Command, tmp_path: Path) -> None:
    main(command("--seed", "4"))
    assert yaml.safe_load((tmp_path / "out" / "00000.yaml").read_text())["seed"] == 4
