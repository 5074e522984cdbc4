"""Files of a source through fsspec: listed in a fixed order, read with a limit, local or in an object store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from data_pipeline.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


class FileRefused(Exception):
    """A file that cannot be used: (reason, detail), as a `Drop` has them."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Place:
    """A folder or file: the file system, and its name there."""

    system: AbstractFileSystem
    path: str

    @property
    def local(self) -> bool:
        return "file" in _protocols(self.system)

    def url(self, path: str) -> str:
        """How a person would write a path of this file system."""
        return path if self.local else str(self.system.unstrip_protocol(path))


def open_place(path: str, key: str) -> Place:
    """Where `path` leads: a local path or any fsspec URL (s3://…, gs://…, memory://…).

    Raises:
        UserError: a scheme that nothing installed can read.
    """
    import fsspec

    try:
        system, inner = fsspec.core.url_to_fs(os.path.expanduser(path))
    except (ImportError, ValueError) as error:
        raise UserError(f"{key}={path}: {' '.join(str(error).split())}; expected a path or an fsspec URL") from error
    return Place(system, str(inner))


def list_files(place: Place, *, recursive: bool = True) -> list[str]:
    """Paths of all files below a folder, relative to it, sorted; hidden ones and linked folders are left out."""
    root = place.path.rstrip("/")
    place.system.invalidate_cache(root)
    found = place.system.find(root, maxdepth=None if recursive else 1)
    relative = [str(path)[len(root) :].lstrip("/") for path in found if str(path) != root]
    return sorted(path for path in relative if not any(part.startswith(".") for part in PurePosixPath(path).parts))


def find_files(paths: str | Sequence[str], suffix: str, key: str) -> list[tuple[Place, str]]:
    """The files that folders (searched with their subfolders), globs and single paths name: each once, sorted.

    Raises:
        UserError: one of them names no such file.
    """
    found: dict[str, tuple[Place, str]] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        place = open_place(path, key)
        try:
            if any(letter in place.path for letter in "*?["):
                files = [str(name) for name in place.system.glob(place.path)]
            elif place.system.isdir(place.path):
                root = place.path.rstrip("/")
                files = [f"{root}/{name}" for name in list_files(place)]
            else:
                files = [place.path] if place.system.isfile(place.path) else []
        except OSError as error:
            raise UserError(f"{key}={path}: cannot be listed ({error})") from error
        files = [name for name in files if name.lower().endswith(suffix)]
        if not files:
            raise UserError(
                f"{key}={path}: no {suffix} file there; give a folder, a file or a glob such as data/*{suffix}"
            )
        found.update({place.url(name): (place, name) for name in files})
    return [found[url] for url in sorted(found)]


def read_file(place: Place, path: str, limit: int) -> bytes:
    """All bytes of a file.

    Raises:
        FileNotFoundError: there is none.
        FileRefused: larger than `limit` bytes, no plain file, or an error of the disk or the store.
    """
    try:
        # A pipe or a device would be waited for without end.
        if place.local and os.path.lexists(path) and not os.path.isfile(path):
            raise FileRefused("unreadable", f"{path}: no plain file")
        with place.system.open(path, "rb") as file:
            data: Any = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise FileRefused("unreadable", f"{path}: {error}") from error
    if len(data) > limit:
        raise FileRefused("too_large", f"{path}: more than {limit:,} bytes")
    return bytes(data)


def _protocols(system: AbstractFileSystem) -> tuple[str, ...]:
    protocol = system.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)
