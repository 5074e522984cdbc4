"""Where shards lie, and how their bytes come here: a folder, an fsspec URL, or a command that writes them out.

Local tars are read in place. Others are fetched whole into a file without a name in `data.scratch`, checked against
size and hash of the shard's stats: the file is gone when its reader closes it or dies, however it dies.
"""

from __future__ import annotations

import hashlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from data_pipeline.errors import UserError
from data_pipeline.shards.storage import LocalStorage, ObjectStorage, storage_of

RETRY_WAITS_S = (1.0, 4.0, 16.0)  # before the second, third and last attempt
STALL_S = 300.0  # a command that writes nothing for so long hangs
CHUNK_BYTES = 1 << 20

ResultType = TypeVar("ResultType")


class Damaged(UserError):
    """Bytes that are not what a shard should hold. Unlike other mistakes it concerns one shard or sample only."""


class ShardPlace(Protocol):
    """Where the files of a source lie. Holds nothing but text: it goes to the workers of a loader."""

    local: Path | None  # folder whose files are read in place

    def address(self, file: str) -> str:
        """How a person finds the file."""

    def chunks(self, file: str) -> Iterator[bytes]:
        """Its bytes; any OSError may be passing, but for FileNotFoundError and PermissionError."""

    def stamps(self) -> dict[str, str]:
        """By name, the files and what changes when they do (size, time …); "": not known."""


class StoredShards:
    """A folder, or anything that fsspec reaches."""

    def __init__(self, folder: str) -> None:
        self.storage = storage_of(os.path.expanduser(folder))
        self.local = self.storage.root if isinstance(self.storage, LocalStorage) else None

    def address(self, file: str) -> str:
        return self.storage.address(file)

    def chunks(self, file: str) -> Iterator[bytes]:
        with _system_errors(), self.storage.open(file) as stream:
            while part := stream.read(CHUNK_BYTES):
                yield part

    def stamps(self) -> dict[str, str]:
        if isinstance(self.storage, ObjectStorage):
            with _system_errors():
                return _listed(self.storage.url)
        if not self.storage.root.is_dir():
            return {}
        with os.scandir(self.storage.root) as entries:
            found = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
        return {name: f"{stat.st_size} {stat.st_mtime_ns}" for name, stat in found}


class PipedShards:
    """A command with {file} in it, run by the shell."""

    local: Path | None = None

    def __init__(self, command: str, files: list[str]) -> None:
        self.command, self.files = command, files

    def address(self, file: str) -> str:
        return self.command.replace("{file}", file)

    def stamps(self) -> dict[str, str]:
        return dict.fromkeys(self.files, "")

    def chunks(self, file: str) -> Iterator[bytes]:
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(
                ["/bin/sh", "-c", self.address(file)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=complaints, start_new_session=True,
            )  # fmt: skip
            try:
                yield from _output(process)
                status = process.wait(STALL_S)
            except subprocess.TimeoutExpired as error:
                raise OSError(f"did not end within {STALL_S:.0f} s of its last byte") from error
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                assert process.stdout is not None
                process.stdout.close()
            if status:
                size = complaints.seek(0, os.SEEK_END)
                complaints.seek(max(0, size - 300))
                told = " ".join(complaints.read().decode("utf-8", "replace").split())
                raise OSError(f"exit status {status}: {told or 'nothing on its error output'}")


def fetched(place: ShardPlace, file: str, size: int, sha256: str, scratch: Path) -> BinaryIO:
    """A copy of a file, checked, under no name.

    Raises:
        Damaged: it has another size or hash.
        OSError: it cannot be read now.
        UserError: there is no room for it.
    """
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        copy = tempfile.TemporaryFile(dir=scratch)
    except OSError as error:
        raise _no_room(scratch, error) from error
    digest, count = hashlib.sha256(), 0
    try:
        for part in place.chunks(file):
            digest.update(part)
            count += len(part)
            if count > size:
                break
            try:
                copy.write(part)
            except OSError as error:
                raise _no_room(scratch, error) from error
        if count != size:
            more = "more than " if count > size else ""
            raise Damaged(f"{place.address(file)}: {more}{min(count, size)} bytes, its stats say {size}")
        if digest.hexdigest() != sha256:
            raise Damaged(f"{place.address(file)}: not the bytes that were written (sha256 differs)")
        copy.seek(0)  # written out, too
    except BaseException:
        copy.close()
        raise
    return copy


def retried(
    action: Callable[[], ResultType], address: str, passing: tuple[type[Exception], ...] = (OSError,)
) -> ResultType:
    """`action()`, again after a while where it fails for a reason that may pass.

    Raises:
        Damaged: as the last attempt.
        UserError: no attempt succeeded; at once where another would be no use.
    """
    waits = list(RETRY_WAITS_S)
    while True:
        try:
            return action()
        except (FileNotFoundError, PermissionError) as error:
            raise _unread(address, "", error) from error
        except passing as error:
            if waits:
                wait = waits.pop(0)
                print(f"{_told(error, address)}; tried again in {wait:g} s", file=sys.stderr, flush=True)
                time.sleep(wait)
                continue
            if isinstance(error, UserError):
                raise
            raise _unread(address, f" in {len(RETRY_WAITS_S) + 1} attempts", error) from error


def _told(error: Exception, address: str) -> str:
    return str(error) if isinstance(error, UserError) else f"{address}: {_reason(error)}"


def _unread(address: str, times: str, error: Exception) -> UserError:
    advice = "check the path, the store and your rights, then run again"
    return UserError(f"{address}: cannot be read{times} ({_reason(error)}); {advice}")


def _output(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """What a process writes, until it closes its output."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(STALL_S):
                raise OSError(f"gave nothing for {STALL_S:.0f} s")
            part = os.read(process.stdout.fileno(), CHUNK_BYTES)
            if not part:
                return
            yield part


def _listed(url: str) -> dict[str, str]:
    import fsspec

    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {' '.join(str(error).split())}") from error
    filesystem.invalidate_cache(root)  # another process may have written since
    try:
        found = filesystem.ls(root, detail=True)
    except FileNotFoundError:
        return {}
    # Names of what a client tells of a file's version differ: s3 ETag, gs md5Hash, memory created …
    return {
        entry["name"].rsplit("/", 1)[-1]: " ".join(f"{key}={entry[key]}" for key in sorted(entry) if key != "name")
        for entry in found
        if entry["type"] == "file"
    }


@contextmanager
def _system_errors() -> Iterator[None]:
    """Clients of stores have exceptions of their own; all become what a file would raise."""
    try:
        yield
    except (OSError, UserError, GeneratorExit):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def _no_room(scratch: Path, error: OSError) -> UserError:
    advice = "make room there or name another folder"
    return UserError(f"data.scratch={scratch}: cannot be written ({_reason(error)}); {advice}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:400] or type(error).__name__
