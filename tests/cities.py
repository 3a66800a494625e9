"""Layouts without images, for tests of what is decided from the index alone; and ragged lists by hand."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from geostream.arrays import Csr
from geostream.layout import MEMBERS, PLACES, Coordinates, Layout, NewLayout, commit_layout
from geostream.store import Store

SPACING = 35.0  # metres between tiles; a tile is twice as wide, as in VIGOR


def csr(lists: list[list[int]]) -> Csr:
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in lists])]).astype(np.int64)
    return Csr(indptr, np.array([i for row in lists for i in sorted(row)], dtype=np.int32))


def city(
    store: Store,
    *,
    side: int = 8,
    areas: int = 2,
    views: int = 1,
    per_shard: int = 16,
    coordinates: Coordinates = "utm",
    name: str = "g0",
    dataset: str = "city",
    seed: int = 0,
) -> Layout:
    """``areas`` grids of ``side`` × ``side`` training places with up to ``views`` views each, and a test place."""
    rng = np.random.default_rng(seed)
    at = [(area, i, j) for area in range(areas) for i in range(side) for j in range(side)]
    row = {place: number for number, place in enumerate(at)}
    places, members = [], []
    for number, (area, i, j) in enumerate([*at, (areas, 0, 0)]):
        split = "train" if number < len(at) else "test"
        north, east = (i * SPACING, j * SPACING) if coordinates == "utm" else (40 + i * 3e-4, -74 + j * 4e-4)
        shown = []
        for view in range(1 + number % views):
            di, dj = rng.choice([-1, 1], 2)
            others = [(area, i + di, j), (area, i, j + dj), (area, i + di, j + dj)]
            semi = [row[other] for other in others if other in row]
            shown.append(
                {
                    "name": f"view-{view:02d}",
                    "split": split,
                    "source": "",
                    "north": north,
                    "east": east,
                    "semi_positives": semi,
                }
            )
        key = f"{area}-{i:03d}-{j:03d}"
        places.append(
            {
                "key": key,
                "area": f"area{area}",
                "splits": [split],
                "north": np.nan if coordinates == "none" else north,
                "east": np.nan if coordinates == "none" else east,
                "source": key,
                "views": shown,
            }
        )
        names = ["tile.jpg", *(f"view-{view:02d}.jpg" for view in range(len(shown))), "json"]
        for member in names:
            members.append((number, member, number // per_shard, 512, 1000 + number, 7))
    shards = 1 + len(at) // per_shard
    table = pa.table([pa.array(column) for column in zip(*members, strict=True)], names=MEMBERS.names)
    offsets = np.zeros(len(members), dtype=np.int64)
    sizes = table["size"].to_numpy()
    shard = table["shard"].to_numpy()
    for number in range(shards):
        here = shard == number
        offsets[here] = 512 + np.concatenate([[0], np.cumsum(sizes[here] + 1024)[:-1]])
    table = table.set_column(MEMBERS.get_field_index("offset"), "offset", pa.array(offsets)).cast(MEMBERS)
    ends = [int((offsets + sizes)[shard == number].max()) + 1024 for number in range(shards)]
    return commit_layout(
        store.child(dataset, "layouts", name),
        NewLayout(
            dataset=dataset,
            name=name,
            generation=0,
            coordinates=coordinates,
            places=pa.Table.from_pylist(places, schema=PLACES),
            members=table,
            shards=[(f"shard-{number:05d}.tar", end) for number, end in enumerate(ends)],
            source={},
            images={},
            broken=[],
        ),
    )


def unit(vectors: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
