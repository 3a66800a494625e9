"""Hold the members of some shards, or of all, as arrays: where they lie, and what they are.

A loader worker needs the members of its lanes' shards only. The facts about a place (``json``) are never streamed and
are left out. A table takes 30 bytes an image, and is cheap to send to another process.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from geostream.arrays import Int16, Int32, Int64, Integers, distinct, pair_codes
from geostream.errors import BadInput
from geostream.layout.layout import FACTS, MEMBERS_FILE, Layout, coded, view_numbers
from geostream.store import Store

Checksums = npt.NDArray[np.uint32]
COLUMNS = {"shard": "i4", "offset": "i8", "size": "i8", "crc32c": "u4", "place": "i4", "member": "i2"}


class Extents(NamedTuple):
    """The positions of M members, sorted by shard and offset.

    Attributes:
        shard: (M,) number of the shard.
        offset: (M,) bytes from its beginning to the data.
        size: (M,) bytes of the data.
    """

    shard: Integers
    offset: Int64
    size: Int64


@dataclass(frozen=True)
class MemberTable:
    """The M images of some of a layout's shards; a *row* below is a row of this table.

    Attributes:
        layout: The layout.
        extents: Positions of the images.
        crc32c: (M,) checksums of their data.
        place: (M,) ids of their places.
        member: (M,) numbers of their names.
        names: The different names, such as "tile.jpg" and "view-00.jpg".
    """

    layout: Layout
    extents: Extents
    crc32c: Checksums
    place: Int32
    member: Int16
    names: list[str]

    @classmethod
    def of(cls, layout: Layout, shards: Int32 | None = None) -> MemberTable:
        """Read the table of some shards.

        Args:
            layout: The layout.
            shards: Numbers of the shards; None reads all.
        """
        first, names = layout.index.first_member, dict[str, int]()
        wanted = np.arange(len(first) - 1) if shards is None else distinct(shards)
        # Room for all members, of which the operating system gives only what is filled; joining parts would take twice.
        room = {name: np.empty(int(np.diff(first)[wanted].sum()), dtype) for name, dtype in COLUMNS.items()}
        stop = 0
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
            if not len(run):
                continue
            rows = int(first[run[0]]), int(first[run[-1] + 1])
            for part in layout.index.parts(MEMBERS_FILE, list(COLUMNS), *rows):
                images = part.filter(pa.array(view_numbers(part["member"]) > FACTS))
                start, stop = stop, stop + len(images)
                for name, column in room.items():
                    values = images[name]
                    if name == "member":
                        column[start:stop] = coded(values, lambda one: names.setdefault(one, len(names)))
                    else:
                        column[start:stop] = values.to_numpy()
        table: dict[str, Any] = {name: column[:stop] for name, column in room.items()}
        extents = Extents(*(table.pop(name) for name in Extents._fields))
        return cls(layout, extents, **table, names=list(names))

    @property
    def store(self) -> Store:
        """The folder below which the shards lie."""
        return self.layout.shards_store

    @cached_property
    def shard_paths(self) -> list[str]:
        """Paths of the layout's shards."""
        return self.layout.shard_paths

    @property
    def shard_sizes(self) -> Int64:
        """Bytes of the layout's shards."""
        return self.layout.shard_sizes

    @cached_property
    def _by_image(self) -> tuple[Int64, Int32]:
        """The images' codes (place and view), sorted, and the row of each."""
        code = image_codes(self.place, view_numbers(pa.chunked_array([self.names], pa.string()))[self.member])
        order = np.argsort(code)
        return code[order], order.astype(np.int32)

    def rows(self, place: Int32, view: Int16 | None = None) -> Int32:
        """Return the rows of some views or tiles.

        Args:
            place: (n,) place ids.
            view: (n,) number of each view within its place; None asks for the places' tiles.

        Returns:
            (n,) rows.

        Raises:
            BadInput: There is no such image in these shards.
        """
        codes, rows = self._by_image
        wanted = image_codes(place, view)
        at = np.minimum(np.searchsorted(codes, wanted), max(len(codes) - 1, 0))
        missing = codes[at] != wanted if len(codes) else np.ones(len(wanted), dtype=bool)
        if missing.any():
            key = self.layout.key(int(np.asarray(place)[missing][0]))
            raise BadInput(
                f"layout {self.layout.name}: place {key} lacks an image that was asked for; plan and layout differ"
            )
        return rows[at]

    def forget_lookup(self) -> None:
        """Free what :meth:`rows` keeps for its next call, 12 bytes an image."""
        self.__dict__.pop("_by_image", None)

    def shard_url(self, shard: int) -> str:
        """Return the URL of the shard with this number."""
        return f"{self.store.url}/{self.shard_paths[shard]}"

    def name(self, row: int) -> str:
        """Return the name of an image within its place, such as "view-00.jpg"."""
        return self.names[int(self.member[row])]

    def key(self, row: int) -> str:
        """Return the key of the place that an image belongs to; this reads the index."""
        return self.layout.key(int(self.place[row]))

    def describe(self, row: int) -> str:
        """Return a text for errors that names an image, its place and its shard."""
        shard = self.shard_url(int(self.extents.shard[row]))
        return f"{self.name(row)} of place {self.key(row)} in {shard}"


def image_codes(place: Int32, view: Int16 | None = None) -> Int64:
    """Return one number for each image, in the order of places, tiles before views.

    Args:
        place: (n,) place ids.
        view: (n,) numbers of views, ``TILE`` for tiles; None for the places' tiles.
    """
    return pair_codes(place, np.zeros(len(place), np.int16) if view is None else (view + 1).astype(np.int16))


def read_image(layout: Layout, place: int, view: int | None = None) -> bytes:
    """Read the file of one image.

    Args:
        layout: The layout.
        place: Id of the place.
        view: Number of the view; None reads the tile.

    Raises:
        BadInput: The place has no such image.
        StoreError: The shard cannot be read.
    """
    one, number = np.array([place], np.int32), None if view is None else np.array([view], np.int16)
    members = MemberTable.of(layout, layout.shard_of_place[one])
    shard, offset, size = (int(column[members.rows(one, number)[0]]) for column in members.extents)
    return members.store.read_range(members.shard_paths[shard], offset, size)
