"""Settings of every command: YAML files merged in order, then `section.key=value`, checked by a pydantic model.

    load_settings(TrainSettings, [Path("a.yaml"), Path("b.yaml")], ["optimizer.learning_rate=1e-4"])

Later files win key by key; a section that changes its `kind` or `backend` starts anew. An unknown key is refused with
the nearest known one; every mistake is one line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from data_pipeline.errors import UserError


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


SettingsType = TypeVar("SettingsType", bound=Settings)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-3` as text and `no` as false; people mean the number and the word."""


class _Dumper(yaml.SafeDumper):
    """Quotes the words that `_Loader` would read as numbers."""


for _reader in (_Loader, _Dumper):
    _reader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
        list("-+0123456789"),
    )
for _letter in "yYnNoO":
    _Loader.yaml_implicit_resolvers[_letter] = [
        resolver for resolver in _Loader.yaml_implicit_resolvers[_letter] if resolver[0] != "tag:yaml.org,2002:bool"
    ]


def load_settings(cls: type[SettingsType], files: Sequence[Path], overrides: Sequence[str]) -> SettingsType:
    """Merge `files` (later wins) and `overrides` ("section.key=value", value read as YAML) into `cls`.

    Raises:
        UserError: missing or unreadable file, bad YAML, unknown key, value of the wrong type, key missing.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for file in files:
        _merge(merged, _read(file), origin, str(file))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override}: expected section.key=value")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise UserError(f"{override}: the value is not valid YAML ({_first_line(error)})") from error
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _merge(merged, nested, origin, "the command line")
    return _checked(cls, merged, origin)


def settings_of(
    cls: type[SettingsType], values: dict[str, Any], source: str, files: Sequence[Path] = ()
) -> SettingsType:
    """Check `values`, which stand in `source` (for messages), merged over `files`.

    Raises:
        UserError: as `load_settings`.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for file in files:
        _merge(merged, _read(file), origin, str(file))
    _merge(merged, values, origin, source)
    return _checked(cls, merged, origin)


def _checked(cls: type[SettingsType], merged: dict[str, Any], origin: dict[str, str]) -> SettingsType:
    try:
        return cls.model_validate(merged)
    except ValidationError as error:
        raise UserError(_explain(cls, error, origin)) from error


def write_settings(settings: Settings, path: Path) -> None:
    """Write the resolved settings as YAML; loading the file gives equal settings."""
    path.write_text(settings_text(settings), encoding="utf-8")


def settings_text(settings: Settings) -> str:
    """The resolved settings as YAML."""
    return yaml.dump(settings.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give an existing YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid YAML ({_first_line(error)})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected keys and values at the top, found a {type(content).__name__}")
    return content


def _merge(
    target: dict[str, Any], update: dict[str, Any], origin: dict[str, str], source: str, prefix: str = ""
) -> None:
    for key, value in update.items():
        path = f"{prefix}{key}"
        origin[path] = source
        if isinstance(value, dict) and isinstance(target.get(key), dict) and not _is_another(target[key], value):
            _merge(target[key], value, origin, source, f"{path}.")
        else:
            target[key] = value
            if isinstance(value, dict):
                _mark(value, origin, source, f"{path}.")


def _is_another(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether a section is now of another class, which does not know the keys of the one before."""
    return any(tag in before and tag in after and before[tag] != after[tag] for tag in ("kind", "backend"))


def _mark(value: dict[str, Any], origin: dict[str, str], source: str, prefix: str) -> None:
    for key, inner in value.items():
        origin[f"{prefix}{key}"] = source
        if isinstance(inner, dict):
            _mark(inner, origin, source, f"{prefix}{key}.")


def _explain(cls: type[Settings], error: ValidationError, origin: dict[str, str]) -> str:
    """The first problem as one line: where it was said, which key, what was expected."""
    first = error.errors()[0]
    names, known = _keys_on_the_way(cls, first["loc"])
    key = ".".join(names)
    given = [".".join(names[:length]) for length in range(len(names), 0, -1)]
    source = next((origin[prefix] for prefix in given if prefix in origin), "the settings")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(names[-1], known, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"{source}: unknown key {key}; {hint}"
    if first["type"] == "missing":
        return f"{key}: missing; give it in a --config file or as {key}=value"
    if first["type"] == "union_tag_invalid":
        context = first["ctx"]
        tag = context["discriminator"].strip("'")
        return f"{source}: {key}.{tag}={context['tag']!r}: expected one of {context['expected_tags']}"
    if first["type"] == "union_tag_not_found":
        return f"{key}.{first['ctx']['discriminator'].strip(chr(39))}: missing; it says which {key} is meant"
    return f"{source}: {key}={first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _keys_on_the_way(cls: type[BaseModel], location: Sequence[int | str]) -> tuple[list[str], list[str]]:
    """The keys of a location as people write them, and those that its last section knows.

    Where a section is one of several classes, pydantic puts the tag of the class into the location: it is left out.
    """
    options: list[type[BaseModel]] = [cls]
    names: list[str] = []
    known: list[str] = []
    for part in location:
        tagged = [option for option in options if _has_tag(option, part)] if len(options) > 1 else []
        if tagged:
            options = tagged
            continue
        names.append(str(part))
        known = list(dict.fromkeys(name for option in options for name in option.model_fields))
        fields = [option.model_fields[part] for option in options if part in option.model_fields]
        if fields or not isinstance(part, int):  # a number is a place in a list of the same sections
            options = [inner for field in fields for inner in _sections(field.annotation)]
    return names, known


def _has_tag(option: type[BaseModel], tag: int | str) -> bool:
    """Whether one of the class's keys can only be `tag`."""
    return any(get_args(field.annotation) == (tag,) for field in option.model_fields.values())


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """The settings classes that a type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections(inner)]


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
