"""Where shards lie: a local folder, read and written with plain files, or any fsspec URL (s3://, gs://, memory://).

A file appears whole or not at all. Locally it is written under a temporary name in the same folder, synced, renamed;
for an object store it is written to a local scratch folder and uploaded in one piece, which stores show only when
complete. Both kinds hold nothing but their address: they can be pickled and survive a fork.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from data_pipeline.errors import UserError

LEFTOVER_AGE_S = 24 * 3600  # of another machine's temporary file: nobody writes for a day without writing
_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]+)\.(?P<pid>\d+)\.\d+\.tmp")
_count = itertools.count()


class LocalStorage:
    """A folder of this machine or of a mounted file system."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def address(self, name: str) -> str:
        """How a person finds the file."""
        return str(self.root / name)

    def names(self) -> list[str]:
        """Files in the folder, sorted; none if it does not exist."""
        if not self.root.is_dir():
            return []
        with os.scandir(self.root) as entries:
            return sorted(entry.name for entry in entries if entry.is_file())

    def open(self, name: str) -> BinaryIO:
        """The file for reading; FileNotFoundError if it is not there."""
        return (self.root / name).open("rb")

    def scratch(self) -> Path:
        """The folder in which temporary files are written; made if needed."""
        self.root.mkdir(parents=True, exist_ok=True)
        return self.root

    def publish(self, temporary: Path, name: str) -> None:
        """Give a temporary file, already synced, its name."""
        os.replace(temporary, self.root / name)
        folder = os.open(self.root, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.root / name).unlink(missing_ok=True)


class ObjectStorage:
    """A folder behind an fsspec URL. Credentials and endpoints come from the environment or fsspec's own settings."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def address(self, name: str) -> str:
        return f"{self.url}/{name}"

    def names(self) -> list[str]:
        filesystem, root = self._filesystem()
        filesystem.invalidate_cache(root)  # another process may have written since
        try:
            with _system_errors():
                found = filesystem.ls(root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rsplit("/", 1)[-1] for entry in found if entry["type"] == "file")

    def open(self, name: str) -> BinaryIO:
        filesystem, root = self._filesystem()
        with _system_errors():
            return filesystem.open(f"{root}/{name}", "rb")

    def scratch(self) -> Path:
        folder = Path(tempfile.gettempdir()) / f"subject-diffusion-uploads-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise UserError(f"{folder}: belongs to somebody else; set TMPDIR to a folder of your own")
        return folder

    def publish(self, temporary: Path, name: str) -> None:
        filesystem, root = self._filesystem()
        with _system_errors():
            filesystem.put_file(str(temporary), f"{root}/{name}")
        temporary.unlink()

    def remove(self, name: str) -> None:
        filesystem, root = self._filesystem()
        try:
            with _system_errors():
                filesystem.rm_file(f"{root}/{name}")
        except FileNotFoundError:
            pass

    def _filesystem(self):  # type: ignore[no-untyped-def]
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.url}: {' '.join(str(error).split())}") from error


Storage = LocalStorage | ObjectStorage


def storage_of(folder: str | os.PathLike[str]) -> Storage:
    """The storage behind a path or a URL."""
    text = os.fspath(folder)
    if text.startswith("file://"):
        return LocalStorage(Path(text.removeprefix("file://")))
    return ObjectStorage(text) if "://" in text else LocalStorage(Path(text))


def split_address(path: str | os.PathLike[str]) -> tuple[Storage, str]:
    """Folder and name of a file given by path or URL."""
    folder, _, name = os.fspath(path).rpartition("/")
    return storage_of(folder or "."), name


def read_bytes(storage: Storage, name: str) -> bytes:
    """A small file, whole.

    Raises:
        UserError: it cannot be read.
    """
    with told_in_one_line(storage.address(name), "read"), storage.open(name) as file:
        return file.read()


def temporary_path(storage: Storage, name: str) -> Path:
    """A new name for a file that is not finished: it tells which process of which machine writes it."""
    host = socket.gethostname().replace(".", "-")
    return storage.scratch() / f".{name}.{host}.{os.getpid()}.{next(_count)}.tmp"


def leftovers(storage: Storage) -> list[Path]:
    """Temporary files of processes that are no more, sorted.

    Those of this machine when their process is gone; those of others when nobody wrote to them for a day.
    """
    host = socket.gethostname().replace(".", "-")
    folder = storage.root if isinstance(storage, LocalStorage) else storage.scratch()
    found = []
    for path in sorted(folder.glob(".*.tmp")) if folder.is_dir() else []:
        match = _TEMPORARY.fullmatch(path.name)
        if match and (_is_old(path) or (match["host"] == host and not _is_alive(int(match["pid"])))):
            found.append(path)
    return found


def clean_leftovers(folder: str | os.PathLike[str]) -> list[Path]:
    """Remove the temporary files of dead runs; finished shards and the files of running processes stay."""
    removed = leftovers(storage_of(folder))
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


@contextmanager
def told_in_one_line(address: str, doing: str) -> Iterator[None]:
    """Turn what the system says of a file into one line for a person."""
    try:
        yield
    except OSError as error:
        what = error.strerror or " ".join(str(error).split()) or type(error).__name__
        advice = "check the path and its rights"
        if doing == "written":
            advice = "what was finished before stays valid: make room or choose another output, then run again"
        raise UserError(f"{address}: cannot be {doing} ({what}); {advice}") from error


@contextmanager
def _system_errors() -> Iterator[None]:
    """Clients of object stores have exceptions of their own; all become what a file would raise."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > LEFTOVER_AGE_S
    except FileNotFoundError:
        return False
