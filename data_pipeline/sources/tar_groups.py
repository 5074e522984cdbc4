"""Reads a tar of unknown origin as groups of members with one key, streaming, with bounded memory.

Nothing is ever unpacked: members are read into memory under limits, and only regular files with plain names. The
headers are parsed by `tarfile` over a file that refuses reads that only a damaged or hostile header would ask for.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

BLOCK = 512
MAX_HEADER_BYTES = 1 << 20  # of a long name or of pax attributes


class BrokenTar(Exception):
    """The tar ends early or its structure is damaged."""


@dataclass
class TarGroup:
    """Neighbouring members of one key: `FOLDER/KEY.SUFFIX`."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)  # suffix in lower case -> bytes
    fault: tuple[str, str] | None = None  # reason and detail: the group cannot be used


class _BoundedFile:
    """A file whose single reads are bounded: `tarfile` reads headers in one piece, whatever size they claim."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.limit = file, MAX_HEADER_BYTES
        self.seek, self.tell = file.seek, file.tell

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self.limit:
            raise BrokenTar(f"a header claims {count:,} bytes")
        return self.file.read(count)


def read_groups(file: BinaryIO, limits: Mapping[str, int]) -> Iterator[TarGroup]:
    """The groups of a tar, in order; members whose suffix is not in `limits` are passed over.

    Args:
        file: seekable, so that what is passed over is not read.
        limits: most bytes of a member, by suffix.
    Raises:
        BrokenTar: the rest cannot be read; a group that was not complete by then is not given.
    """
    bounded = _BoundedFile(file)
    group: TarGroup | None = None
    try:
        with tarfile.open(fileobj=bounded, mode="r:", errorlevel=2) as tar:  # type: ignore[call-overload]
            while (member := _next(tar)) is not None:
                key, suffix, fault = _place(member)
                if key is None or (fault is None and suffix not in limits):
                    continue
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                    group = TarGroup(key)
                if fault is None and member.size > limits[suffix]:
                    fault = "too_large", f"{_shown(member)}: {member.size:,} bytes"
                if fault is None and suffix in group.members:
                    fault = "repeated_key", f"{_shown(member)}: twice in a row"
                if fault is not None:
                    group.fault, group.members = group.fault or fault, {}
                elif group.fault is None:
                    group.members[suffix] = _content(tar, member, bounded)
            _check_end(tar.offset, bounded)
    except (BrokenTar, GeneratorExit):
        raise
    except Exception as error:  # what `tarfile` raises on damaged headers is not listed anywhere
        raise BrokenTar(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if group is not None:
        yield group


def _next(tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    before = tar.offset
    member = tar.next()
    tar.members = []  # type: ignore[attr-defined]  # else the headers of all members stay in memory
    # A negative size leads back to where the reading has been: without end.
    if member is not None and (member.size < 0 or member.offset_data < BLOCK or tar.offset < before):
        raise BrokenTar(f"{_shown(member)}: negative size")
    return member


def _place(member: tarfile.TarInfo) -> tuple[str | None, str, tuple[str, str] | None]:
    """Key, suffix and fault of a member; no key: it belongs to no sample."""
    if member.isdir():
        return None, "", None
    path = PurePosixPath(member.name)
    stem, _, suffix = path.name.partition(".")
    key = str(path.parent / stem) if stem else str(path)
    if not member.isreg() or member.issparse():
        return key, suffix.lower(), ("unsafe_member", f"{_shown(member)}: a link, a device or a file with holes")
    if path.is_absolute() or ".." in path.parts or "\\" in member.name:
        return key, suffix.lower(), ("unsafe_member", f"{_shown(member)}: leads out of the folder")
    return key, suffix.lower(), None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, bounded: _BoundedFile) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    bounded.limit = max(member.size, MAX_HEADER_BYTES)
    data: Any = file.read()
    bounded.limit = MAX_HEADER_BYTES
    if len(data) != member.size:
        raise BrokenTar(f"{_shown(member)}: ends early")
    return bytes(data)


def _check_end(offset: int, bounded: _BoundedFile) -> None:
    """`tarfile` takes a damaged header for the end; the real one is a block of zeros."""
    bounded.seek(offset)
    if bounded.read(BLOCK) != bytes(BLOCK):
        raise BrokenTar("no end mark: a writer was stopped, or a header is damaged")


def _shown(member: tarfile.TarInfo) -> str:
    return ascii(member.name[:200])
