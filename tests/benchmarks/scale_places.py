"""Millions of places without images: a committed layout in clustered order and embeddings of it, written in blocks.

Each place has a tile, a view for training and its facts; sizes are those of :mod:`tests.benchmarks.index_only`. Its
vectors are of towns of districts of some two thousand places. A district's places lie along eight directions of its
own, and are stored in the order of the first, as a similarity order stores them. On the ground the places lie on square
grids, one for each area. Each view has the three places to its east, south and south-east as semi-positives, as far as
there are any. Id, place in the order and place on the ground have nothing to do with one another. While this writes, it
holds 40 bytes a place.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import ndtri

from geostream.arrays import Float32, Float64, Int32, Int64
from geostream.layout import MEMBERS, PLACES, Layout, open_layout
from geostream.layout.files import FORMAT, shard_name
from geostream.mining.embeddings import SHARD_ROWS, create_embeddings
from geostream.store import Store
from geostream.store.store import ROW_GROUP
from tests.benchmarks.index_only import BLOCK, JSON_BYTES, TILE_BYTES, VIEW_BYTES, padded

DATASET, LAYOUT = "places", "base"
EMBEDDINGS = "embeddings/epoch-0001.zarr"
AREA = 1_000_000  # places of an area
TOWN, DISTRICT = 20_000, 2_000  # places
PER_SHARD = 480  # 128 MiB
TILE = 3e-4  # degrees between two places


class Ground:
    """Where each of ``n`` places lies: in the order of the shards, in which district, and on the ground."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.areas = max(1, n // AREA)
        self.side = int(np.ceil(np.sqrt(-(-n // self.areas))))
        #: Few places have shards that are smaller, so that each of many lanes has some.
        self.per_shard = max(1, min(PER_SHARD, n // 320))
        rng = np.random.default_rng([n, 0])
        self.place = rng.permutation(n).astype(np.int32)  # (N,) the id in each slot, a place in the clustered order
        self.cell = rng.permutation(n).astype(np.int32)  # (N,) of each id
        size = rng.lognormal(0, 0.5, max(1, n // DISTRICT))
        self.first = np.concatenate([[0], np.round(np.cumsum(size) / size.sum() * n)]).astype(np.int64)  # slots

    @cached_property
    def slot(self) -> Int32:
        """(N,) of each id."""
        return _inverse(self.place)

    @cached_property
    def in_cell(self) -> Int32:
        """(N,) the id in each cell."""
        return _inverse(self.cell)

    def district(self, ids: slice) -> tuple[Int64, Float64]:
        """Return the district of each place, and its rank within it, between 0 and 1."""
        slot = self.slot[ids]
        district = np.searchsorted(self.first, slot, side="right") - 1
        begin, end = self.first[district], self.first[district + 1]
        return district, (slot - begin + 0.5) / (end - begin)

    def position(self, ids: slice) -> Float64:
        """Return (n, 2) degrees; areas lie side by side."""
        index, area = np.divmod(self.cell[ids], self.areas)
        north, east = np.divmod(index, self.side)
        return np.stack([40 + north * TILE, -74 + (east + 2 * self.side * area) * TILE], axis=1)

    def near(self, ids: slice) -> tuple[Int32, Int32]:
        """Return the semi-positives of each place: how many, and all of them one after the other."""
        cell = self.cell[ids].astype(np.int64)
        index = cell // self.areas
        not_last = (index + 1) % self.side != 0
        steps = np.array([1, self.side, self.side + 1]) * self.areas
        other = cell[:, None] + steps
        there = (other < self.n) & np.stack([not_last, np.ones_like(not_last), not_last], axis=1)
        return there.sum(axis=1).astype(np.int32), self.in_cell[other[there]]


def _inverse(permutation: Int32) -> Int32:
    inverse = np.empty_like(permutation)
    inverse[permutation] = np.arange(len(permutation), dtype=np.int32)
    return inverse


def make(folder: Path, n: int) -> Layout:
    """Write the layout of ``n`` places and its embeddings below ``folder``; the embeddings' dimension is 128."""
    ground, store = Ground(n), Store.open(folder)
    layout = commit(store, ground)
    write_embeddings(store.child("run"), layout, ground, 128)
    return layout


def commit(store: Store, ground: Ground) -> Layout:
    """Write the index by row groups, and commit it.

    The id of the layout is made from the files' hashes: hashing all values, as a commit does, would take an hour.
    """
    folder = store.child(DATASET, "layouts", LAYOUT)
    home = Path(folder.url)
    home.mkdir(parents=True)
    with _writer(home / "places.parquet", PLACES) as places:
        for start in range(0, ground.n, ROW_GROUP):
            places.write_table(_places(ground, slice(start, min(start + ROW_GROUP, ground.n))))
    shards = _write_members(home / "members.parquet", ground)
    hashes = {}
    for file in ("places.parquet", "members.parquet"):
        with (home / file).open("rb") as source:
            hashes[file] = hashlib.file_digest(source, "sha256").hexdigest()
    info = {
        "format": FORMAT,
        "dataset": DATASET,
        "layout": LAYOUT,
        "id": hashlib.sha256("".join(hashes.values()).encode()).hexdigest()[:16],
        "generation": 0,
        "parent": None,
        "coordinates": "latlon",
        "protocols": ["paired"],
        "places": ground.n,
        "pairs": {"train": ground.n},
        "bytes": sum(shard["size"] for shard in shards),
        "shards": shards,
        "images": {},
        "source": {},
        "broken": [],
        "index": hashes,
    }
    folder.write_json("layout.json", info, if_absent=True)
    return open_layout(store, DATASET, LAYOUT)


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Return a writer with the options of :func:`geostream.store.table_bytes`."""
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)


def _places(ground: Ground, ids: slice) -> pa.Table:
    n, position = ids.stop - ids.start, ground.position(ids)
    counts, near = ground.near(ids)
    view = {
        "name": pa.array(["view-00"] * n),
        "split": pa.array(["train"] * n),
        "source": pa.array([""] * n),
        "north": pa.array(position[:, 0]),
        "east": pa.array(position[:, 1]),
        "semi_positives": pa.ListArray.from_arrays(
            np.concatenate([[0], np.cumsum(counts)]).astype(np.int32), pa.array(near)
        ),
    }
    one_each = np.arange(n + 1, dtype=np.int32)
    columns = {
        "key": pa.array([f"{cell:09d}" for cell in ground.cell[ids].tolist()]),
        "area": pa.array([f"city-{area}" for area in (ground.cell[ids] % ground.areas).tolist()]),
        "splits": pa.ListArray.from_arrays(one_each, pa.array(["train"] * n)),
        "north": pa.array(position[:, 0]),
        "east": pa.array(position[:, 1]),
        "source": pa.array([""] * n),
        "views": pa.ListArray.from_arrays(one_each, pa.StructArray.from_arrays(list(view.values()), names=list(view))),
    }
    return pa.table(columns).cast(PLACES)


def _write_members(path: Path, ground: Ground) -> list[dict[str, Any]]:
    """Write the table of members; return the shards as ``layout.json`` has them."""
    rng = np.random.default_rng([ground.n, 1])
    shards = -(-ground.n // ground.per_shard)
    begin, end, in_shard = (np.zeros(shards, dtype=np.int64) for _ in range(3))
    written = 0  # bytes of all members before
    names = pa.array(["tile.jpg", "view-00.jpg", "json"])
    with _writer(path, MEMBERS) as writer:
        for start in range(0, ground.n, ROW_GROUP):
            slots = np.arange(start, min(start + ROW_GROUP, ground.n))
            rows = 3 * len(slots)
            mean = np.array([TILE_BYTES, VIEW_BYTES, JSON_BYTES])
            size = (mean * rng.uniform(0.8, 1.2, (len(slots), 3))).astype(np.int64).ravel()
            taken = padded(size)
            ends = written + np.cumsum(taken)
            begins, written = ends - taken, int(ends[-1])
            shard = np.repeat(slots // ground.per_shard, 3)
            opens = np.flatnonzero(slots % ground.per_shard == 0)
            begin[slots[opens] // ground.per_shard] = begins[3 * opens]
            end[shard] = ends  # the last of a shard's stays
            in_shard += np.bincount(shard, minlength=shards)
            columns = {
                "place": np.repeat(ground.place[slots], 3),
                "member": names.take(pa.array(np.tile([0, 1, 2], len(slots)))),
                "shard": shard,
                "offset": begins - begin[shard] + BLOCK,
                "size": size,
                "crc32c": rng.integers(0, 2**32, rows, dtype=np.uint32),
            }
            writer.write_table(pa.table(columns).select(MEMBERS.names).cast(MEMBERS), row_group_size=ROW_GROUP)
    sizes = end - begin + 2 * BLOCK
    return [
        {"name": shard_name(number), "size": size, "members": members}
        for number, (size, members) in enumerate(zip(sizes.tolist(), in_shard.tolist(), strict=True))
    ]


def write_embeddings(run: Store, layout: Layout, ground: Ground, dim: int) -> None:
    """Write embeddings of all places, a Zarr shard at a time."""
    rng = np.random.default_rng([ground.n, 2])

    def normal(*shape: int) -> Float32:
        return rng.standard_normal(shape, dtype=np.float32)

    towns, districts = max(1, ground.n // TOWN), len(ground.first) - 1
    # Districts of a town are next to one another in the order.
    centre = normal(towns, dim)[np.arange(districts) * towns // districts] + normal(districts, dim)
    along = 0.3 * normal(districts, 8, dim)
    pairs = layout.pairs("train")
    writer = create_embeddings(
        run,
        EMBEDDINGS,
        layout=layout,
        checkpoint="",
        split="train",
        pairs=pairs,
        reference_place=pairs.place,
        dim=dim,
    )
    for start in range(0, ground.n, SHARD_ROWS):
        rows = np.arange(start, min(start + SHARD_ROWS, ground.n))
        district, rank = ground.district(slice(rows[0], rows[-1] + 1))
        where = normal(len(rows), 1, 8)
        where[:, 0, 0] = ndtri(rank)  # places of a district are stored in this order
        reference = centre[district] + 0.3 * normal(len(rows), dim)
        reference += np.matmul(where, along[district])[:, 0]
        query = reference + 0.5 * normal(len(rows), dim)
        for write, vectors in ((writer.write_reference, reference), (writer.write_query, query)):
            write(rows, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    writer.commit()
