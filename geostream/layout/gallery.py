"""Compute the id of a layout's test gallery: two layouts with one id give figures that can be compared.

Figures depend on the tiles and views of the test set, and on which tiles of it are semi-positives of which query. The
id does not depend on the numbers of places, views and shards, so a reclustering keeps it, and an append that leaves the
test set alone does, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geostream.arrays import Int64, pair_codes
from geostream.layout.schema import Protocol

AT_ONCE = 2**16  # places that are Python objects at the same time


def gallery_id(places: pa.Table, members: pa.Table, protocols: Sequence[Protocol]) -> str:
    """Return the hash of the test set: key and checksum of each tile and view, and the semi-positives among its tiles.

    Memory holds about 30 bytes a member beside the tables, and 65,536 places of the test set at a time.

    Args:
        places: The table of places.
        members: The table of members.
        protocols: The data set's protocols. Where positions decide what is right, the id depends on them.

    Returns:
        16 hexadecimal digits.
    """
    lists = places["splits"].combine_chunks()
    of_test = pc.list_parent_indices(lists).to_numpy()[pc.equal(lists.flatten(), "test").to_numpy(zero_copy_only=False)]
    is_reference = np.zeros(len(places), dtype=bool)
    is_reference[of_test] = True
    views = places["views"].combine_chunks()
    shown = pc.list_parent_indices(views).to_numpy()[
        pc.not_equal(views.flatten().field("split"), "train").to_numpy(zero_copy_only=False)
    ]
    in_test = is_reference.copy()
    in_test[shown] = True
    rows = np.flatnonzero(in_test)
    rows = rows[pc.sort_indices(places["key"].take(rows)).to_numpy()]
    codes, checksums = _checksums(members, in_test)
    digest = hashlib.sha256()
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start : start + AT_ONCE]
        for row, place in zip(some.tolist(), places.take(some).to_pylist(), strict=True):
            lines = _lines(row, place, places["key"], is_reference, (codes, checksums), "within-5m" in protocols)
            digest.update("\n".join([place["key"], *lines, ""]).encode())
    return digest.hexdigest()[:16]


def _checksums(members: pa.Table, wanted: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[Int64, Int64]:
    """Return sorted codes of the images of the wanted places (view number + 1; 0: the tile), and their checksums."""
    place = members["place"].to_numpy()
    names = members["member"].combine_chunks().dictionary_encode()
    numbers = np.array([_number(name) for name in names.dictionary.to_pylist()], dtype=np.int16)
    number = numbers[names.indices.to_numpy()]
    rows = np.flatnonzero(wanted[place] & (number >= 0))
    codes = pair_codes(place[rows], number[rows])
    order = np.argsort(codes)
    return codes[order], members["crc32c"].to_numpy()[rows[order]].astype(np.int64)


def _number(member: str) -> int:
    """Return 0 for a tile, one more than its number for a view, and -1 for the facts."""
    stem = member.split(".", 1)[0]
    return int(stem.removeprefix("view-")) + 1 if stem.startswith("view-") else 0 if stem == "tile" else -1


def _lines(
    row: int,
    place: dict[str, Any],
    keys: pa.ChunkedArray,
    is_reference: np.ndarray[Any, np.dtype[np.bool_]],
    images: tuple[Int64, Int64],
    with_positions: bool,
) -> list[str]:
    """Return what the id depends on of one place, a line an image, sorted."""
    codes, checksums = images

    def checksum(number: int) -> int:
        return int(checksums[np.searchsorted(codes, (row << 16) | number)])

    def spot(one: dict[str, Any]) -> str:
        return f" {one['north']!r} {one['east']!r}" if with_positions else ""

    lines = [f"tile {checksum(0)}{spot(place)}"] if is_reference[row] else []
    for number, view in enumerate(place["views"], start=1):
        if view["split"] != "train":
            right = sorted(keys[other].as_py() for other in view["semi_positives"] if is_reference[other])
            lines.append(f"{view['split']} {checksum(number)}{spot(view)} {' '.join(right)}")
    return sorted(lines)
