"""The folder of shards as a build sees it: which settings and models it belongs to, and what is done.

`settings.yaml` (what was asked), `provenance.json` (which models answer) and `redo.json` (a stage being run again)
stand beside the shards. A build that does not fit them is refused before anything is written; `NAME_stats.json` says
that a shard is done.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import yaml

from data_pipeline.build_settings import DataSettings
from data_pipeline.errors import UserError
from data_pipeline.record import SCHEMA_VERSION, Provenance
from data_pipeline.settings import settings_text
from data_pipeline.shards.shard_stats import ShardStats, stats_from_json
from data_pipeline.shards.storage import (
    LocalStorage,
    Storage,
    clean_leftovers,
    read_bytes,
    storage_of,
    temporary_path,
    told_in_one_line,
)
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.sources import Unit

FREE_SECTIONS = ("output", "engine", "gallery")  # say where and how, not what
FREE_KEYS = tuple(f"source.{key}" for key in ("processes", "threads", "environment", "python"))  # of a download
SUFFIX = "_stats.json"


class Output:
    """One output folder, and the build that is asked for."""

    def __init__(self, settings: DataSettings, redo: str | None = None) -> None:
        self.settings, self.redo, self.folder = settings, redo, settings.output
        self.storage = storage_of(settings.output)

    def begin(self) -> None:
        """Check that this build fits what lies in the folder, then put the settings beside the shards.

        Raises:
            UserError: other settings or another version began it; a stage is being redone; nothing to redo.
        """
        clean_leftovers(self.folder)
        if self.redo and self.settings.engine.slice_of[1] > 1:
            raise UserError(f"--redo {self.redo}: goes over all finished shards; leave engine.slice out")
        if self.redo and not self.finished():
            raise UserError(f"--redo {self.redo}: {self.folder} holds no finished shard; build it first")
        self._compare()
        running = self._read("redo.json")
        if running.get("stage") and running["stage"] != self.redo:
            raise UserError(
                f"{self.folder}: --redo {running['stage']} was begun and is not finished; run it again to its end first"
            )
        if self.redo and not running.get("stage"):
            self._write("redo.json", {"number": running.get("number", 0) + 1, "stage": self.redo})
        if self.redo or "settings.yaml" not in self.storage.names():
            write_bytes(self.storage, "settings.yaml", settings_text(self.settings).encode())

    def end(self) -> None:
        """All that was asked for is done; what a killed run's last processes left since `begin` goes too."""
        clean_leftovers(self.folder)
        if self.redo:
            self._write("redo.json", {"number": self.redo_number(), "stage": None})

    def redo_number(self) -> int:
        """How often a stage has been run again over this output."""
        return int(self._read("redo.json").get("number", 0))

    def hold_to(self, provenance: Mapping[str, Provenance]) -> None:
        """Refuse models other than those that began the output; those of a stage that is redone take their place.

        Raises:
            UserError: a model differs.
        """
        found = self._read("provenance.json")
        asked = {name: asdict(who) for name, who in provenance.items()}
        for name, who in asked.items():
            if not self.redo and found.get(name, who) != who:
                raise UserError(
                    f"{self.folder}: begun with {name} by {_named(found[name])}, now {_named(who)}; "
                    f"use another output, or --redo {name} when it is finished"
                )
        if {**found, **asked} != found:
            self._write("provenance.json", {**found, **asked})

    def finished(self) -> dict[str, ShardStats]:
        """Statistics of the shards that are complete, by name."""
        names = [name for name in self.storage.names() if name.endswith(SUFFIX)]
        return {name.removesuffix(SUFFIX): self._stats(name) for name in names}

    def todo(self, units: list[Unit]) -> list[Unit]:
        """Those units that are not done yet."""
        if self.redo:
            number, finished = self.redo_number(), self.finished()
            return [unit for unit in units if finished[unit.name].facts.get("redo", 0) != number]
        there = set(self.storage.names())
        return [unit for unit in units if unit.name + SUFFIX not in there]

    def open_writer(self, unit: Unit) -> ShardWriter:
        """The writer of a unit's shard."""
        facts = {
            "settings": content_hash(self.settings),
            "program": program_version(),
            "schema": SCHEMA_VERSION,
            "redo": self.redo_number(),
        }
        return ShardWriter(self.folder, unit.name, facts)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else builds this slice of a local output meanwhile; on an object store two builds write equal shards.

        Raises:
            UserError: another process does.
        """
        if not isinstance(self.storage, LocalStorage):
            yield
            return
        import fcntl

        number, count = self.settings.engine.slice_of
        with told_in_one_line(self.folder, "written"):
            file = (self.storage.scratch() / f".build-{number}-of-{count}.lock").open("a")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"{self.folder}: another process is building it; wait for it, or give each run its engine.slice=i/n"
                ) from error
            yield

    def _stats(self, name: str) -> ShardStats:
        return stats_from_json(read_bytes(self.storage, name), self.storage.address(name))

    def _compare(self) -> None:
        if "settings.yaml" not in self.storage.names():
            return
        address = self.storage.address("settings.yaml")
        began = yaml.safe_load(read_bytes(self.storage, "settings.yaml"))
        now = yaml.safe_load(settings_text(self.settings))
        for key, before, after in _differences(began, now):
            if key.split(".")[0] in FREE_SECTIONS or key in FREE_KEYS or (self.redo and _may_change(key, self.redo)):
                continue
            part = key.split(".")
            stage = part[1] if part[0] == "stages" and not self.redo else None
            raise UserError(
                f"{address}: this output was begun with {key}={before}, now {key}={after}; "
                "use another output folder" + (f", or --redo {stage}, when it is finished" if stage else "")
            )
        for name in self.storage.names():
            if not self.redo and name.endswith(SUFFIX):
                program = self._stats(name).facts.get("program")
                if program != program_version():
                    raise UserError(
                        f"{self.storage.address(name)}: built by version {program}, this is {program_version()}; "
                        "finish it with that version, or use another output folder"
                    )
                break  # one shard speaks for all

    def _read(self, name: str) -> dict[str, Any]:
        if name not in self.storage.names():
            return {}
        content: dict[str, Any] = json.loads(read_bytes(self.storage, name))
        return content

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        write_bytes(self.storage, name, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def write_bytes(storage: Storage, name: str, data: bytes) -> None:
    """Write a small file, which appears whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with told_in_one_line(storage.address(name), "written"):
        temporary = temporary_path(storage, name)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        storage.publish(temporary, name)


def program_version() -> str:
    """Of this package, as installed."""
    return version("subject-diffusion")


def content_hash(settings: DataSettings) -> str:
    """Of all settings that decide what the shards hold."""
    values = {k: v for k, v in settings.model_dump(mode="json").items() if k not in FREE_SECTIONS}
    values["source"] = {k: v for k, v in values["source"].items() if f"source.{k}" not in FREE_KEYS}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _may_change(key: str, redo: str) -> bool:
    """Whether a key may differ when `redo` and the stages after it run again."""
    from data_pipeline.engine.steps import STAGES

    return key.startswith("rules.") or any(key.startswith(f"stages.{stage}") for stage in STAGES[STAGES.index(redo) :])


def _differences(before: Any, after: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            yield from _differences(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif before != after:
        yield prefix, before, after


def _named(who: Mapping[str, str]) -> str:
    return " ".join(part for part in (who["backend"], who["model"], who["revision"][:12]) if part)
