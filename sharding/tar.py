"""Write one shard: a WebDataset tar in memory, whose bytes depend on its members alone.

Headers are plain ustar without owner or time, so the same members give the same bytes on any machine and day.
"""

from __future__ import annotations

import io
import tarfile
from typing import NamedTuple

END = 2 * tarfile.BLOCKSIZE  # bytes of the empty blocks that end an archive


class Member(NamedTuple):
    """Say where a member's data lies in its shard, and its checksum.

    Attributes:
        name: what follows the place's key: "tile.jpg", "view-00.jpg", "json".
        offset: bytes from the shard's beginning to the data, behind the header.
        size: bytes of the data.
        crc32c: checksum of the data.
    """

    name: str
    offset: int
    size: int
    crc32c: int


class ShardTar:
    """Collect members into a tar by webdataset's writer, and note where each one lies."""

    def __init__(self) -> None:
        # Imported here: it imports torch, 0.5 GB and 2 s that the processes that only encode are spared.
        from webdataset import TarWriter

        self._stream = io.BytesIO()
        plain = {"mtime": 0, "user": "", "group": "", "mode": 0o644, "format": tarfile.USTAR_FORMAT}
        self._writer = TarWriter(self._stream, encoder=False, **plain)

    def add(self, key: str, name: str, data: bytes, crc32c: int) -> Member:
        """Append the member ``key.name``, of which ``crc32c`` is the checksum; return its entry in the index."""
        # The writer's position, not the stream's: the writer hands on what it has in blocks of 10 kB.
        header = self._writer.tarstream.offset
        self._writer.write({"__key__": key, name: data})
        return Member(name, header + tarfile.BLOCKSIZE, len(data), crc32c)

    def close(self) -> bytes:
        """End the archive and return all of it."""
        end = self._writer.tarstream.offset + END
        self._writer.close()
        self._stream.truncate(end)  # tarfile fills up to a multiple of 10 kB: our shards end with two blocks
        return self._stream.getvalue()
