"""The benchmark's data: pairs of textured JPEGs of realistic size, their embeddings, and one hard plan for two layouts.

Decides that images are made, not shipped: a few dozen textures, rolled, flipped and tinted for each pair, at sizes in
bytes that photographs of this many pixels have (about 115 kB a tile, 165 kB a panorama). Libraries see only bytes, so
what the images show does not matter; their number and size do. It costs half a minute for 4,320 pairs.
The hard plan is made from embeddings drawn from a mixture of Gaussians, on a layout in clustered order; the unclustered
layout holds the same places in random order and is read with the very same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import simplejpeg

from geostream.arrays import Csr
from geostream.layout import Layout
from geostream.planning.batches import assemble
from geostream.planning.lane import SamplingProblem
from geostream.planning.plan import EpochPlan, save_plan
from geostream.store import Store
from tests.benchmarks.pairs import Pairs, write_pairs
from tests.helpers import TinyPlace, write_layout

TILE, VIEW = (384, 384), (384, 768)  # height, width
TEXTURES = 32
CLUSTERS = 300
DIMENSIONS = 64
NEIGHBOURS = 64
RESIDENT = 4  # shards of a lane
SHARD_BYTES = 64 * 2**20
QUALITIES = 95, 90  # of tile and view
DATASET = "bench"

Pixels = npt.NDArray[np.uint8]
Embeddings = npt.NDArray[np.float32]
Tick = Callable[[], object]


def make_pairs(folder: Path, count: int, seed: int, tick: Tick) -> Pairs:
    """``count`` pairs on local disk; ``tick`` is called after each."""
    rng = np.random.default_rng(seed)
    bases = [[_texture(rng, *size) for _ in range(TEXTURES)] for size in (TILE, VIEW)]

    def encoded() -> Iterator[tuple[bytes, bytes]]:
        for _ in range(count):
            varied = (_varied(rng, of_size[rng.integers(TEXTURES)]) for of_size in bases)
            tile, view = (_encode(*one) for one in zip(varied, QUALITIES, strict=True))
            yield tile, view
            tick()

    return write_pairs(folder, encoded())


def _texture(rng: np.random.Generator, height: int, width: int) -> Pixels:
    """Noise in octaves, with a few flat shapes in it."""
    image = np.full((height, width, 3), 128.0)
    for step, strength in ((128, 45.0), (32, 30.0), (8, 24.0), (2, 20.0), (1, 4.0)):
        coarse = rng.normal(0.0, strength, (-(-height // step), -(-width // step), 3))
        image += np.kron(coarse, np.ones((step, step, 1)))[:height, :width]
    for _ in range(12):
        top, left = rng.integers(height - 16), rng.integers(width - 16)
        image[top : top + rng.integers(16, 96), left : left + rng.integers(16, 96)] += rng.normal(0.0, 60.0, 3)
    return np.clip(image, 0, 255).astype(np.uint8)


def _varied(rng: np.random.Generator, base: Pixels) -> Pixels:
    rolled = np.roll(base, rng.integers(base.shape[1]), axis=1)
    flipped = rolled[:, ::-1] if rng.random() < 0.5 else rolled
    return np.ascontiguousarray(flipped ^ rng.integers(0, 16, 3, dtype=np.uint8))


def _encode(pixels: Pixels, quality: int) -> bytes:
    return bytes(simplejpeg.encode_jpeg(pixels, quality, colorspace="RGB", colorsubsampling="420"))


def embeddings(count: int, seed: int) -> Embeddings:
    """(count, DIMENSIONS) of unit length, from a mixture of CLUSTERS Gaussians."""
    rng = np.random.default_rng([seed, 1])
    centres = rng.normal(size=(CLUSTERS, DIMENSIONS))
    points = centres[rng.integers(CLUSTERS, size=count)] + 0.3 * rng.normal(size=(count, DIMENSIONS))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def clustered_order(points: Embeddings) -> list[int]:
    """Rows so ordered that near ones are near one another: halved along the widest direction, again and again."""

    def halve(rows: npt.NDArray[np.int64]) -> list[int]:
        if len(rows) <= 8:
            return rows.tolist()
        centred = points[rows] - points[rows].mean(axis=0)
        widest = np.linalg.svd(centred[:512], full_matrices=False)[2][0]
        by_side = rows[np.argsort(centred @ widest)]
        middle = len(rows) // 2
        return halve(by_side[:middle]) + halve(by_side[middle:])

    return halve(np.arange(len(points)))


def write_layouts(store: Store, pairs: Pairs, seed: int, tick: Tick) -> tuple[Layout, Layout]:
    """The pairs as tar shards in clustered and in random order; ``tick`` is called after each layout."""
    places = [
        TinyPlace(f"place-{i:05d}", "area", ("train",), (0.0, 0.0), {"tile.jpg": tile, "view-00.jpg": view})
        for i, (tile, view) in enumerate(pairs)
    ]
    per_shard = max(1, SHARD_BYTES * len(places) // pairs.n_bytes)
    orders = {
        "clustered": clustered_order(embeddings(len(places), seed)),
        "random": np.random.default_rng([seed, 2]).permutation(len(places)).tolist(),
    }
    layouts = []
    for name, order in orders.items():
        layouts.append(write_layout(store, places, places_per_shard=per_shard, dataset=DATASET, name=name, order=order))
        tick()
    return layouts[0], layouts[1]


def write_plans(store: Store, clustered: Layout, unclustered: Layout, batch_size: int, lanes: int, seed: int) -> int:
    """The hard plan of epoch 0 for each layout, under ``runs/<layout>``: the same batches. Returns their number."""
    pairs = clustered.pairs("train")
    points = embeddings(clustered.n_places, seed)
    likeness = points @ points.T
    np.fill_diagonal(likeness, -1.0)
    nearest = np.argsort(-likeness, axis=1)[:, :NEIGHBOURS].astype(np.int32)
    alone = Csr(np.zeros(clustered.n_places + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
    made = assemble(
        SamplingProblem(pairs.place, clustered.shard_of_place, nearest, alone),
        strategy="sample4geo",
        batch_size=batch_size,
        lanes=lanes,
        resident=RESIDENT,
        seed=seed,
        epoch=0,
    )
    plan = EpochPlan(
        layout_id=clustered.id,
        epoch=0,
        seed=seed,
        strategy="sample4geo",
        source="visual",
        graph="",
        lanes=lanes,
        batch_size=batch_size,
        place=pairs.place[made.batches],
        view=pairs.view[made.batches],
        left_out_place=pairs.place[made.left_out],
        left_out_view=pairs.view[made.left_out],
    )
    for layout in (clustered, unclustered):
        save_plan(store.child("runs", layout.name), replace(plan, layout_id=layout.id))
    return plan.n_batches
