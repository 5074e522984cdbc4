"""Plain tar members, written and read one after the other: a USTAR header, the bytes, padding. Nothing else is read.

Python's tarfile keeps every member in memory, reads extended headers of any size and knows links and devices; a shard
needs none of it. Headers are tarfile's own (`TarInfo.tobuf`, `TarInfo.frombuf`). WebDataset reads these files; its
`TarWriter(mtime=0)` would write the same layout, but importing it takes seconds and torch.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data_pipeline.errors import UserError

BLOCK = 512
END = bytes(2 * BLOCK)
MAX_MEMBER_BYTES = 64 * 2**20  # a picture of 1024 px has 2**20 at most; more is not ours


@dataclass(frozen=True)
class Member:
    """A regular file in a tar."""

    name: str
    offset: int  # of its header, bytes
    size: int
    data: bytes | None  # None: passed over

    @property
    def end(self) -> int:
        """Where the next header begins."""
        return self.offset + BLOCK + _padded(self.size)


def member_bytes(name: str, data: bytes) -> bytes:
    """Header, data and padding of one member: no time, owner 0, read-only, so that equal samples are equal bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(data), 0, 0o444
    header = info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    return header + data + bytes(_padded(len(data)) - len(data))


def read_members(stream: BinaryIO, where: str, *, start: int = 0) -> Iterator[Member]:
    """Members of an open tar in one forward pass, each with its bytes.

    Args:
        stream: stands at a header.
        where: name of the file, for messages.
        start: position of the stream in the file.

    Raises:
        UserError: anything but regular files of bounded size, a damaged header, an end before the end.
    """
    return _members(stream, where, start, skip=False)


def scan_members(stream: BinaryIO, where: str) -> Iterator[Member]:
    """As `read_members` for a stream that can seek, without the bytes: only headers are read."""
    return _members(stream, where, 0, skip=True)


def _members(stream: BinaryIO, where: str, offset: int, skip: bool) -> Iterator[Member]:
    while True:
        header = _read(stream, BLOCK, where, offset)
        if not header.strip(b"\0"):
            return
        info = _header(header, where, offset)
        padded = _padded(info.size)
        if skip:
            stream.seek(padded, 1)
            yield Member(info.name, offset, info.size, None)
        else:
            data = _read(stream, padded, where, offset, info.name)
            yield Member(info.name, offset, info.size, data[: info.size])
        offset += BLOCK + padded


def _header(block: bytes, where: str, offset: int) -> tarfile.TarInfo:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, ValueError) as error:
        raise UserError(
            f"{where}: no tar header at byte {offset}; the file is damaged, build this shard again"
        ) from error
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise UserError(
            f"{where}: {info.name!r} is not a plain file (tar type {info.type!r}); shards hold nothing else"
        )
    if not 0 <= info.size <= MAX_MEMBER_BYTES:
        raise UserError(f"{where}: {info.name!r} has {info.size} bytes; members have at most {MAX_MEMBER_BYTES}")
    return info


def _read(stream: BinaryIO, size: int, where: str, offset: int, name: str = "") -> bytes:
    parts = []
    missing = size
    while missing and (part := stream.read(missing)):
        parts.append(part)
        missing -= len(part)
    if missing:
        inside = f" inside of {name!r}" if name else ""
        raise UserError(f"{where}: ends{inside} after byte {offset}; the file is cut short, build this shard again")
    return b"".join(parts)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
