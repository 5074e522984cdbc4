"""What both pages need of a built folder: its finished units, its settings, a place for the page itself."""

from __future__ import annotations

import os

from jinja2 import Environment, PackageLoader, StrictUndefined

from data_pipeline.errors import UserError
from data_pipeline.people import wording
from data_pipeline.shards.reader import FinishedShard, list_shards
from data_pipeline.shards.storage import Storage, read_bytes, temporary_path, told_in_one_line

SETTINGS_FILE = "settings.yaml"


def finished_shards(folder: str | os.PathLike[str]) -> list[FinishedShard]:
    """The finished shards, in order of their names.

    Raises:
        UserError: there is none.
    """
    found = list_shards(folder)
    if not found:
        raise UserError(f"{os.fspath(folder)}: no finished shard (NAME_stats.json); give the output folder of a build")
    return found


def settings_text(storage: Storage) -> str:
    """The settings of the build as they were written beside the shards; "" where there are none."""
    if SETTINGS_FILE not in storage.names():
        return ""
    return read_bytes(storage, SETTINGS_FILE).decode("utf-8", "replace")


def folder_name(folder: str | os.PathLike[str]) -> str:
    """The last part of a path or an address: a page that is passed on says nothing of the machine it was made on."""
    text = os.fspath(folder)
    parts = (text if "://" in text else os.path.abspath(text)).rstrip("/").split("/")
    return parts[-1] or "dataset"


def templates() -> Environment:
    """The folder's templates; everything they are given is escaped."""
    environment = Environment(
        loader=PackageLoader("data_pipeline.people", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(wording=wording)
    return environment


def write_page(storage: Storage, name: str, text: str) -> str:
    """Write a page in place of an older one, whole or not at all; returns its address.

    Raises:
        UserError: it cannot be written.
    """
    with told_in_one_line(storage.address(name), "written"):
        temporary = temporary_path(storage, name)
        try:
            temporary.write_bytes(text.encode("utf-8", "replace"))
            storage.publish(temporary, name)
        finally:
            temporary.unlink(missing_ok=True)
    return storage.address(name)
