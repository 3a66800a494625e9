"""Layouts without images: an index of places whose images would be as large as the field's, committed like any other.

What a plan decides, and what reading it costs, follows from the index alone; so plans for a million places are measured
without a million images. Sizes are those of 384×384 tiles and 384×768 panoramas as JPEGs of quality 90, spread by a
fifth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from geostream.layout import MEMBERS, PLACES, Coordinates, Layout, NewLayout, commit_layout
from geostream.store import Store

TILE_BYTES, VIEW_BYTES, JSON_BYTES = 115_000, 163_000, 400
BLOCK = 512  # of a tar file

Ints = npt.NDArray[np.integer]


class Members(NamedTuple):
    """Every member of every place, place by place."""

    place: Ints
    name: pa.Array
    size: Ints


def places_table(area: Ints, position: npt.NDArray[np.float64], views: Ints) -> pa.Table:
    """``area`` (N,), ``position`` (N, 2) metres, ``views`` (N,) how many each has; all are for training."""
    n, flat = len(area), int(views.sum())
    number = np.concatenate([np.arange(count) for count in views.tolist()])
    view = pa.StructArray.from_arrays(
        [
            pa.array([f"view-{i:02d}" for i in range(int(views.max()))]).take(pa.array(number)),
            pa.array(["train"] * flat),
            pa.array([""] * flat),
            pa.array(np.repeat(position[:, 0], views)),
            pa.array(np.repeat(position[:, 1], views)),
            pa.ListArray.from_arrays(np.zeros(flat + 1, np.int32), pa.array([], pa.int32())),
        ],
        names=["name", "split", "source", "north", "east", "semi_positives"],
    )
    starts = np.concatenate([[0], np.cumsum(views)]).astype(np.int32)
    columns = {
        "key": pa.array([f"{i:08d}" for i in range(n)]),
        "area": pa.array([f"city-{i}" for i in area.tolist()]),
        "splits": pa.ListArray.from_arrays(np.arange(n + 1, dtype=np.int32), pa.array(["train"] * n)),
        "north": pa.array(position[:, 0]),
        "east": pa.array(position[:, 1]),
        "source": pa.array([""] * n),
        "views": pa.ListArray.from_arrays(starts, view),
    }
    return pa.table(columns).cast(PLACES)


def members_of(views: Ints, seed: int) -> Members:
    """Tile, views and facts of each place, with sizes drawn from ``seed``."""
    rng = np.random.default_rng(seed)
    count = views + 2
    place = np.repeat(np.arange(len(views)), count)
    at = np.arange(len(place)) - np.repeat(np.cumsum(count) - count, count)  # 0: tile, then views, then facts
    facts = at == np.repeat(count, count) - 1
    mean = np.where(at == 0, TILE_BYTES, VIEW_BYTES)
    size = np.where(facts, JSON_BYTES, mean * rng.uniform(0.8, 1.2, len(place))).astype(np.int64)
    names = pa.array(["json", "tile.jpg", *(f"view-{i:02d}.jpg" for i in range(int(views.max())))])
    return Members(place, names.take(pa.array(np.where(facts, 0, at + 1))), size)


def padded(size: Ints) -> npt.NDArray[np.int64]:
    """Return the bytes that members of ``size`` bytes take in a tar file, header and padding included."""
    return (BLOCK + -(-size // BLOCK) * BLOCK).astype(np.int64)


def commit_index(
    store: Store,
    name: str,
    places: pa.Table,
    members: Members,
    shards: Sequence[Ints],
    *,
    coordinates: Coordinates,
    parent: Layout | None = None,
) -> Layout:
    """The layout ``name`` with the places of ``shards`` in that order."""
    order = np.concatenate(shards)
    row = np.argsort(members.place, kind="stable")
    counts = np.bincount(members.place)
    first = np.cumsum(counts) - counts
    of_place = counts[order]
    inner = np.arange(of_place.sum()) - np.repeat(np.cumsum(of_place) - of_place, of_place)
    rows = row[np.repeat(first[order], of_place) + inner]
    shard = np.repeat(np.repeat(np.arange(len(shards)), [len(s) for s in shards]), of_place)
    taken = padded(members.size[rows])
    end = np.cumsum(taken)
    before = np.concatenate([[0], end[np.flatnonzero(np.diff(shard))]])
    offset = end - taken - before[shard] + BLOCK
    ends = np.maximum.reduceat(offset + taken - BLOCK, np.searchsorted(shard, np.arange(len(shards))))
    table = pa.table(
        {
            "place": members.place[rows],
            "member": members.name.take(pa.array(rows)),
            "shard": shard,
            "offset": offset,
            "size": members.size[rows],
            "crc32c": np.zeros(len(rows), dtype=np.int64),
        }
    ).select(MEMBERS.names)
    return commit_layout(
        store.child("places", "layouts", name),
        NewLayout(
            dataset="places",
            name=name,
            generation=0 if parent is None else parent.generation + 1,
            coordinates=coordinates,
            places=places,
            members=table,
            shards=[(f"shard-{number:05d}.tar", int(end) + 2 * BLOCK) for number, end in enumerate(ends)],
            source={},
            images={},
            broken=[],
            parent=None if parent is None else parent.id,
        ),
    )
