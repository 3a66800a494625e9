"""A WebDataset tar whose bytes depend on its members alone.

Decides the plainest header there is (ustar, no owner, time 0), so that the same members give the same bytes
on any machine and day, and any tar reads them. The tar is built in memory, from members or from pieces that
other processes built.
"""

from __future__ import annotations

import io
import tarfile
from typing import NamedTuple

import google_crc32c


class Member(NamedTuple):
    """Where a member's data lies in its shard (behind the header), and its checksum."""

    name: str  # "tile.jpg", "view-00.jpg", "json": what follows the key
    offset: int
    size: int
    crc32c: int


class Tar:
    """Collects members; ``piece()`` is what was collected, ``bytes()`` closes the archive."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()

    def add(self, key: str, name: str, data: bytes) -> Member:
        info = tarfile.TarInfo(f"{key}.{name}")
        info.size, info.mode = len(data), 0o644
        self._buffer.write(info.tobuf(format=tarfile.USTAR_FORMAT))
        offset = self._buffer.tell()
        self._buffer.write(data)
        self._buffer.write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return Member(name, offset, len(data), google_crc32c.value(data))

    def append(self, piece: bytes) -> int:
        """Add the members of another's ``piece()``; returns how far that moves their offsets."""
        start = self._buffer.tell()
        self._buffer.write(piece)
        return start

    def piece(self) -> bytes:
        return self._buffer.getvalue()  # no copy: BytesIO hands out its own buffer

    def bytes(self) -> bytes:
        self._buffer.write(bytes(2 * tarfile.BLOCKSIZE))
        return self._buffer.getvalue()
