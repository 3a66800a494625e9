"""Places without images, with embeddings and a graph on the store, for tests of the order alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from geostream.layout import Layout
from geostream.mining.embeddings import Embeddings, create_embeddings, open_embeddings
from geostream.mining.graph import GraphWriter, NeighbourGraph, open_graph
from geostream.store import Store
from tests.cities import unit

EMBEDDINGS, GRAPH = "embeddings/epoch-0002.zarr", "neighbours/epoch-0002.zarr"
ROWS = 4096  # embedded and written at a time


class Placed(NamedTuple):
    """A layout with the embeddings and the graph of its training places."""

    layout: Layout
    embeddings: Embeddings
    graph: NeighbourGraph


def placed(root: Store, layout: Layout, *, dim: int = 16, kinds: int = 12, k: int = 20, seed: int = 0) -> Placed:
    """Place p looks like kind p % kinds; its neighbours are of its kind, near it in a list of them, some missing."""
    run, pairs = root.child("run"), layout.pairs("train")
    places = np.unique(pairs.place)
    centres = unit(np.random.default_rng(seed).standard_normal((kinds, dim)))
    writer = create_embeddings(
        run,
        EMBEDDINGS,
        layout=layout,
        checkpoint="step-00000001",
        split="train",
        pairs=pairs,
        reference_place=places,
        dim=dim,
    )
    for of, write in ((pairs.place, writer.write_query), (places, writer.write_reference)):
        for start in range(0, len(of), ROWS):
            some = of[start : start + ROWS]
            noise = np.random.default_rng([seed, start]).standard_normal((len(some), dim))
            write(np.arange(start, start + len(some)), unit(centres[some % kinds] + 0.7 * unit(noise)))
    writer.commit()
    graph = GraphWriter.create(run, GRAPH, kind="visual", layout=layout, embeddings=EMBEDDINGS, places=places, k=k)
    rng = np.random.default_rng(seed + 1)
    for start in range(0, len(places), 2048):
        row = np.arange(start, min(start + 2048, len(places)))
        near = row[:, None] + kinds * rng.choice(np.delete(np.arange(-40, 41), 40), (len(row), k))
        near[rng.random(near.shape) < 0.02] = -1
        inside = (near >= 0) & (near < len(places))
        found = np.where(inside, places[np.clip(near, 0, len(places) - 1)], -1).astype(np.int32)
        scores = np.where(inside, -np.arange(k, dtype=np.float32), -np.inf)
        graph.write(start, found, scores)
    graph.commit({"mode": "exact"})
    return Placed(layout, open_embeddings(run, EMBEDDINGS, layout), open_graph(run, GRAPH, layout))
