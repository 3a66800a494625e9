"""What mining reads of a layout, made from arrays, and embeddings of it: for sizes at which a layout takes minutes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import pyarrow as pa

from geostream.arrays import Csr, Float32, Float64, Int32, Pairs
from geostream.layout import MEMBERS, Layout
from geostream.layout.index import Index
from geostream.mining.embeddings import SHARD_ROWS, create_embeddings
from geostream.store import Store

EMBEDDINGS = "embeddings/epoch-0001.zarr"
TILE = 3e-4  # degrees between two places


@dataclass(frozen=True)
class Places:
    """``n`` training places on square grids, one for each area, with ids in random order: the worst for a search tree.

    Two places of the same row of the grid share no batch where they are next to one another.
    """

    n: int
    areas: int = 1
    name: str = "synthetic"
    id: str = "synthetic"
    coordinates: str = "latlon"
    joined: tuple[()] = ()

    @property
    def part(self) -> Int32:
        return np.zeros(self.n, dtype=np.int32)

    @property
    def places_id(self) -> str:
        return f"{self.n}-{self.areas}"

    @cached_property
    def _cell(self) -> Int32:
        return np.random.default_rng(self.n).permutation(self.n).astype(np.int32)

    @cached_property
    def area(self) -> Int32:
        return self._cell % self.areas

    @cached_property
    def position(self) -> Float64:
        side = round((self.n / self.areas) ** 0.5)
        north, east = np.divmod(self._cell // self.areas, side)
        return np.stack([40 + north * TILE, -74 + east * TILE], axis=1)

    @cached_property
    def places(self) -> pa.Table:
        return pa.table({"key": [f"{cell:08d}" for cell in self._cell.tolist()]})

    @property
    def index(self) -> Index:
        return Index(Store(""), {}, (self.places, MEMBERS.empty_table()))

    def pairs(self, split: str) -> Pairs:
        assert split == "train"
        return Pairs(np.arange(self.n, dtype=np.int32), np.zeros(self.n, dtype=np.int16))

    def excluded(self, split: str) -> Csr:
        assert split == "train"
        at = np.argsort(self._cell).astype(np.int32)  # the place in each cell
        partner = at[np.minimum(self._cell ^ self.areas, self.n - 1)]  # of the same area
        return Csr(np.arange(self.n + 1, dtype=np.int64), partner)

    def semi_positives(self, split: str) -> Csr:
        return self.excluded(split)


def places(n: int, areas: int = 1) -> Layout:
    return cast("Layout", Places(n, areas))


def write_embeddings(run: Store, layout: Layout, dim: int) -> None:
    """Embeddings of the training places, a Zarr shard at a time: towns of districts of some two thousand places.

    Places of a district lie along eight directions of its own, with noise in every dimension; a query is its tile with
    more noise. Towns and districts grow in number with N: a larger dataset covers more ground.
    """
    pairs = layout.pairs("train")
    n, rng = len(pairs), np.random.default_rng(1)

    def normal(*shape: int) -> Float32:
        return rng.standard_normal(shape, dtype=np.float32)

    towns, districts = max(1, n // 20_000), max(1, n // 2_000)
    size = rng.lognormal(0, 0.5, districts)
    centre = normal(towns, dim)[rng.integers(0, towns, districts)] + normal(districts, dim)
    along = 0.3 * normal(districts, 8, dim)
    writer = create_embeddings(
        run, EMBEDDINGS, layout=layout, checkpoint="", split="train", pairs=pairs, reference_place=pairs.place, dim=dim
    )
    for start in range(0, n, SHARD_ROWS):
        rows = np.arange(start, min(start + SHARD_ROWS, n))
        district = rng.choice(districts, len(rows), p=size / size.sum())
        reference = centre[district] + 0.3 * normal(len(rows), dim)
        reference += np.matmul(normal(len(rows), 1, 8), along[district])[:, 0]
        query = reference + 0.5 * normal(len(rows), dim)
        for write, vectors in ((writer.write_reference, reference), (writer.write_query, query)):
            write(rows, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    writer.commit()
