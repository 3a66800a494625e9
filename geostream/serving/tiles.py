"""Read single tiles of a layout from its shards, by range.

The page shows tiles as they are stored: nothing is decoded here. Where each tile lies is held in memory, 28 bytes a
place, so that a tile costs one request to the store. The request is made once: the browser shows the page without the
tile meanwhile, and a store that is away is reported after seconds instead of minutes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import google_crc32c
import numpy as np

from geostream.arrays import Int32, Int64
from geostream.errors import NotFound, StoreError, Unanswered
from geostream.layout import Layout
from geostream.layout.layout import MEMBERS_FILE, TILE, view_numbers
from geostream.layout.members import Checksums

AT_ONCE = 16  # requests to the store
TIMEOUT = 10.0  # seconds that the store has for a tile
COLUMNS = ("place", "shard", "offset", "size", "crc32c")


@dataclass(frozen=True)
class Tiles:
    """Know where the tile of each of the N places lies.

    Attributes:
        layout: The layout.
        shard: (N,) number of the shard; -1 for a place that was removed.
        offset: (N,) bytes from the shard's beginning to the tile.
        size: (N,) bytes of the tile.
        crc32c: (N,) checksums.
        gate: Bounds the requests that are under way.
    """

    layout: Layout
    shard: Int32
    offset: Int64
    size: Int64
    crc32c: Checksums
    gate: asyncio.Semaphore

    @classmethod
    def of(cls, layout: Layout) -> Tiles:
        """Read the table of a layout's tiles, a part of the index at a time."""
        n = layout.n_places
        shard, offset, size = np.full(n, -1, np.int32), np.zeros(n, np.int64), np.zeros(n, np.int64)
        crc32c = np.zeros(n, np.uint32)
        for part in layout.index.parts(MEMBERS_FILE, ["member", *COLUMNS]):
            tile = view_numbers(part["member"]) == TILE
            columns = {name: part[name].to_numpy()[tile] for name in COLUMNS}
            place = columns["place"]
            shard[place], offset[place] = columns["shard"], columns["offset"]
            size[place], crc32c[place] = columns["size"], columns["crc32c"]
        return cls(layout, shard, offset, size, crc32c, asyncio.Semaphore(AT_ONCE))

    async def read(self, place: int) -> bytes:
        """Read the file of a place's tile.

        Args:
            place: Id of the place.

        Raises:
            NotFound: There is no such place, or it was removed.
            Unanswered: The store did not answer.
            StoreError: The shard cannot be read, or the tile in it is damaged.
        """
        if not 0 <= place < len(self.shard) or self.shard[place] < 0:
            raise NotFound(f"layout {self.layout.name} has no tile of place {place}")
        path = self.layout.shard_paths[self.shard[place]]
        store, size, data = self.layout.shards_store, int(self.size[place]), bytearray()
        try:
            async with self.gate, asyncio.timeout(TIMEOUT):
                async for chunk, _ in store.stream_range(path, int(self.offset[place]), size):
                    data += chunk
        except TimeoutError as error:
            raise Unanswered(f"{store.url}/{path}: no answer within {TIMEOUT:.0f} s", "stalled") from error
        if google_crc32c.value(bytes(data)) != self.crc32c[place]:
            where = f"{store.url}/{path}, bytes {self.offset[place]} to {self.offset[place] + size - 1}"
            raise StoreError(f"{where}: the tile is damaged; geostream verify checks the whole layout")
        return bytes(data)
