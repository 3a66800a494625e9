"""Places to plan with: synthetic by the ten thousand, those of a rendered city after training, some with many views.

``mixed`` is like the data of the design's table: each city has a field that changes within a few hundred metres, and
every place two appearances, of 100 each, that have nothing to do with where it is, so that no order suits all
neighbours. ``types`` has one of 400 appearances, which shards of equal size cannot follow. ``many_views`` is
University-1652's kind: 701 places, 54 views each, no coordinates.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from geostream.layout import Coordinates, Layout, open_layout
from geostream.layout.members import MemberTable
from geostream.mining.embeddings import Embeddings, create_embeddings, open_embeddings, read_rows
from geostream.runs.loop import train
from geostream.runs.run import Run
from geostream.settings import default_settings
from geostream.store import Store
from sharding import ShardOptions, read_places, shard
from sharding.order import storage_order
from sharding.simcity import render_cities
from sharding.simcity.plan import CitySpec
from tests.benchmarks.index_only import places_table

Float32 = npt.NDArray[np.float32]

DIM = 128
EPOCH = 5  # whose embeddings are used of the trained city


class Places(NamedTuple):
    """What a layout and its embeddings are made of."""

    table: pa.Table
    coordinates: Coordinates
    views: npt.NDArray[np.int64]  # (N,) how many each place has
    query: Float32  # (P, D) in the order of (place, view)
    reference: Float32  # (N, D)
    order: npt.NDArray[np.int64]  # (N,) rows as the first generation stores them


def unit(vectors: npt.NDArray[np.floating]) -> Float32:
    unit: Float32 = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def synthetic(kind: str, n: int, seed: int) -> Places:
    """``n`` places of four cities, one view each; ``kind``: mixed or types."""
    rng = np.random.default_rng(seed)
    factors, appearances, share = (2, 100, 0.7) if kind == "mixed" else (1, 400, 0.6)
    city = np.repeat(np.arange(4), n // 4)
    position = rng.random((len(city), 2))
    vectors = 0.3 * unit(rng.normal(size=(4, DIM)))[city]
    for number in range(4):
        waves, phase = rng.normal(size=(2, 64)) * 80, rng.random(64) * 2 * np.pi
        here = city == number
        vectors[here] += 0.4 * unit(np.cos(position[here] @ waves + phase) @ rng.normal(size=(64, DIM)))
    for _ in range(factors):
        kinds = unit(rng.normal(size=(appearances, DIM)))
        vectors += share / np.sqrt(factors) * kinds[rng.integers(0, appearances, len(city))]
    reference = unit(vectors + 0.5 * unit(rng.normal(size=(len(city), DIM))))
    query = unit(reference + 0.4 * unit(rng.normal(size=(len(city), DIM))))
    metres = position * 10_000
    order = storage_order(np.zeros(len(city), dtype=np.int64), city, metres, latlon=False)
    views = np.ones(len(city), dtype=np.int64)
    return Places(places_table(city, metres, views), "utm", views, query, reference, order)


def many_views(seed: int, places: int = 701, views: int = 54) -> Places:
    """As University-1652's training set."""
    rng = np.random.default_rng(seed)
    kinds = unit(rng.normal(size=(30, DIM)))
    reference = unit(kinds[rng.integers(0, 30, places)] + 0.8 * unit(rng.normal(size=(places, DIM))))
    count = np.full(places, views)
    query = unit(np.repeat(reference, views, axis=0) + 0.5 * unit(rng.normal(size=(places * views, DIM))))
    table = places_table(np.zeros(places, dtype=np.int64), np.full((places, 2), np.nan), count)
    return Places(table, "none", count, query, reference, np.arange(places))


def rendered(folder: Path, seed: int, side: int = 23, cities: int = 13) -> Places:
    """Render and shard cities, train on them for six epochs by the product's trainer, and take what it embedded."""
    store = Store.open(folder / "store")
    specs = [CitySpec(f"Train{i:02d}", side, side) for i in range(cities)] + [CitySpec("Test", 12, 12)]
    render_cities(folder / "raw", specs, seed=seed, tile_size=48, view_size=(32, 128), max_offset=0.1, empty_share=0.0)
    names = {"train_cities": [spec.name for spec in specs[:-1]], "test_cities": ["Test"]}
    options = ShardOptions(tile_size=(48, 48), view_size=(32, 128), shard_bytes=2**19)
    shard(read_places("vigor", folder / "raw", **names), store, "simcity", options=options)
    changed = {"epochs": EPOCH + 1, "first_mining": EPOCH, "evaluate_every": EPOCH + 1, "seed": seed}
    layout = open_layout(store)
    train(store, layout, "plan", default_settings("simcity").changed(**changed))
    embeddings = open_embeddings(store.child("simcity", "runs", "plan"), Run.embeddings_name("train", EPOCH), layout)
    return _training_places(layout, embeddings)


def _training_places(layout: Layout, embeddings: Embeddings) -> Places:
    ids, place = np.unique(embeddings.pairs.place, return_inverse=True)
    views = np.bincount(place)
    table = places_table(layout.area[ids], layout.position[ids], views)
    reference = read_rows(embeddings.reference)[np.searchsorted(embeddings.reference_place, ids)]
    order = np.argsort(MemberTable.of(layout).rows(ids), kind="stable")
    return Places(table, layout.coordinates, views, read_rows(embeddings.query), reference, order)


def write_embeddings(run: Store, layout: Layout, places: Places) -> Embeddings:
    """The places' embeddings in the run, committed."""
    pairs, name = layout.pairs("train"), Run.embeddings_name("train", EPOCH)
    writer = create_embeddings(
        run,
        name,
        layout=layout,
        checkpoint="",
        split="train",
        pairs=pairs,
        reference_place=np.arange(layout.n_places, dtype=np.int32),
        dim=places.query.shape[1],
    )
    writer.write_query(np.arange(len(pairs)), places.query)
    writer.write_reference(np.arange(layout.n_places), places.reference)
    writer.commit()
    return open_embeddings(run, name, layout)
