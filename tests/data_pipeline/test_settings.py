"""Settings: files merged in order, overrides last, and every mistake one line that names file, key and remedy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from data_pipeline.errors import UserError, run_command
from data_pipeline.settings import Settings, load_settings, write_settings


class Inner(Settings):
    rate: float = 1.0
    steps: int = 10


class Outer(Settings):
    name: str
    inner: Inner = Inner()
    tags: tuple[str, ...] = ()


class Folder(Settings):
    kind: Literal["folder"]
    path: str
    recursive: bool = True


class Rendered(Settings):
    kind: Literal["rendered"]
    scenes: int = 4


class Build(Settings):
    source: Annotated[Folder | Rendered, Field(discriminator="kind")]
    more: tuple[Annotated[Folder | Rendered, Field(discriminator="kind")], ...] = ()


def write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_later_files_win_key_by_key_and_overrides_win_last(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "name: a\ninner: {rate: 2, steps: 3}\n")
    second = write(tmp_path, "b.yaml", "inner: {rate: 4}\n")
    settings = load_settings(Outer, [first, second], ["inner.steps=7", "tags=[x, y]"])
    assert settings == Outer(name="a", inner=Inner(rate=4, steps=7), tags=("x", "y"))


def test_a_number_with_an_exponent_is_a_number(tmp_path: Path) -> None:
    assert load_settings(Outer, [], ["name=a", "inner.rate=1e-3"]).inner.rate == 0.001


def test_the_words_no_and_off_stay_words() -> None:
    assert load_settings(Outer, [], ["name=no", "tags=[off, yes]"]) == Outer(name="no", tags=("off", "yes"))


def test_written_settings_load_as_they_were(tmp_path: Path) -> None:
    settings = Outer(name="a: 'b'", inner=Inner(rate=1e-5), tags=("é", "1e5", "no", "true", "12", "null", ""))
    write_settings(settings, tmp_path / "out.yaml")
    assert load_settings(Outer, [tmp_path / "out.yaml"], []) == settings


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("name: a\ninnner: {}\n", [], r"a\.yaml: unknown key innner; did you mean inner\?"),
        ("name: a\ninner: {rat: 1}\n", [], r"a\.yaml: unknown key inner\.rat; did you mean rate\?"),
        ("name: a\n", ["inner.stepps=1"], r"the command line: unknown key inner\.stepps; did you mean steps\?"),
        ("name: a\ninner: {steps: many}\n", [], r"a\.yaml: inner\.steps='many': input should be a valid integer"),
        ("tags: [x]\n", [], r"name: missing; give it in a --config file or as name=value"),
        ("name: [a\n", [], r"a\.yaml: not valid YAML"),
        ("- a\n", [], r"a\.yaml: expected keys and values at the top, found a list"),
        ("name: a\n", ["inner"], r"inner: expected section\.key=value"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_settings(Outer, [write(tmp_path, "a.yaml", text)], overrides)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.yaml: cannot be read \(No such file"):
        load_settings(Outer, [tmp_path / "gone.yaml"], [])


def test_a_users_mistake_ends_with_status_2_and_an_interrupt_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    def mistaken(argv: object) -> int:
        raise UserError("dog.png: no picture; give a PNG")

    def interrupted(argv: Sequence[str] | None) -> int:
        raise KeyboardInterrupt(*(argv or ()))

    assert run_command(mistaken) == 2
    assert capsys.readouterr().err == "error: dog.png: no picture; give a PNG\n"
    assert run_command(interrupted, []) == 130 and capsys.readouterr().err == "interrupted\n"
    assert run_command(interrupted, ["z.png: not written"]) == 130
    assert capsys.readouterr().err == "interrupted: z.png: not written\n"


def test_a_section_of_another_kind_starts_anew(tmp_path: Path) -> None:
    first = write(tmp_path, "a.yaml", "source: {kind: rendered, scenes: 9}\n")
    settings = load_settings(Build, [first], ["source.kind=folder", "source.path=photos"])
    assert settings.source == Folder(kind="folder", path="photos")
    assert load_settings(Build, [first], ["source.scenes=3"]).source == Rendered(kind="rendered", scenes=3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("source.kind=web", "the command line: source.kind='web': expected one of 'folder', 'rendered'"),
        ("source.scene=3", "the command line: unknown key source.scene; did you mean scenes?"),
        ("source={path: x}", "source.kind: missing; it says which source is meant"),
        ("source.kind=folder", "source.path: missing; give it in a --config file or as source.path=value"),
        ("more=[{kind: rendered, scene: 2}]", "the command line: unknown key more.0.scene; did you mean scenes?"),
    ],
)
def test_mistakes_in_a_section_of_several_kinds_name_keys_as_people_write_them(
    tmp_path: Path, override: str, message: str
) -> None:
    files = [] if override.startswith("source={") else [write(tmp_path, "a.yaml", "source: {kind: rendered}\n")]
    with pytest.raises(UserError) as told:
        load_settings(Build, files, [override])
    assert str(told.value) == message
