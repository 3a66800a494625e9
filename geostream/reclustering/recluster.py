"""Recluster a layout: write its next generation, with the shards in the order of similarity.

Training places are ordered by the mean of their tile's and views' embeddings, after these means are moved towards their
neighbours in the graph (:mod:`geostream.planning.smoothing`). There are about as many shards as before, each made of
pieces from all over the order (:mod:`geostream.planning.spreading`). Places without training pairs have no embedding.
They keep their order and are kept apart from training places, because training would read them for nothing.

Finding the order takes seconds (:mod:`geostream.reclustering.order`); rewriting reads and writes every byte once
(:mod:`geostream.reclustering.rewrite`).
"""

from __future__ import annotations

from functools import partial

import dask
import numpy as np

from geostream.arrays import Float32, Int32
from geostream.dask import run_tasks
from geostream.errors import BadInput, StaleArtefact
from geostream.layout import Layout
from geostream.mining.embeddings import SHARD_ROWS, Embeddings, read_rows
from geostream.mining.graph import NeighbourGraph
from geostream.planning.make_plan import reachable_by_shards
from geostream.planning.smoothing import NEAR, smoothed
from geostream.planning.spreading import Spread, shard_of_rows, spread_out
from geostream.reclustering.order import RunTasks, shard_similarity, similarity_order
from geostream.reclustering.rewrite import rewrite, tar_bytes
from geostream.settings import TrainSettings
from geostream.store import Store


def recluster(
    store: Store,
    layout: Layout,
    run_name: str,
    embeddings: Embeddings,
    graph: NeighbourGraph,
    settings: TrainSettings,
    cluster: str | None = None,
) -> Layout:
    """Write the next generation of a layout in the order of its training set's embeddings.

    The new layout is named ``<root>-g<generation>``; if another order has that name, "-2" and so on is appended. If the
    same generation was written before, nothing is written and it is opened. A call that was killed is continued.

    Args:
        store: The store that holds the dataset.
        layout: The layout to recluster.
        run_name: The run that the embeddings are from, noted in ``layout.json``.
        embeddings: Embeddings of the layout's training set.
        graph: The neighbour graph of these embeddings.
        settings: Settings of the plans to come, which decide into how many pieces of the order a shard is spread.
        cluster: URL of a Dask scheduler whose workers reach the store; None works within this process.

    Returns:
        The new layout, or ``layout`` itself if it has this very order. ``info["source"]`` holds ``pieces``, the number
        of pieces in a shard, and ``similarity``, the mean cosine of two training places of one shard, before and after.

    Raises:
        StaleArtefact: The embeddings are of other places, or the graph is of other embeddings.
        BadInput: The embeddings are of another split.
        StoreError: A member is damaged, or the store cannot be read or written.
    """
    if embeddings.places_id != layout.places_id:
        raise StaleArtefact(f"{embeddings.name}: made from other places than those of {layout.name}; embed again")
    if embeddings.split != "train":
        raise BadInput(f"{embeddings.name}: of split {embeddings.split!r}; a layout is ordered by the training set's")
    if graph.embeddings != embeddings.name:
        raise StaleArtefact(f"graph {graph.name} came from {graph.embeddings}, not from {embeddings.name}; mine again")
    places = np.unique(layout.pairs("train").place)
    vectors = place_vectors(embeddings, places)
    import distributed.config  # noqa: F401  # loads its defaults before some are changed for a while

    # The vectors are sent with the tasks, of which Dask would warn.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TB"}):
        map_fn = partial(run_tasks, cluster, stage="recluster-subtree")
        rows, pieces = shards_by_similarity(layout, vectors, embeddings, graph, settings, map_fn)
    shards = [*(places[of] for of in rows), *_without_pairs(layout, places)]
    if [part.tolist() for part in shards] == [part.tolist() for part in _by_shard(_in_order(layout), layout)]:
        return layout
    source = {
        "made_from": layout.name,
        "run": run_name,
        "embeddings": embeddings.name,
        "checkpoint": embeddings.checkpoint,
        "pieces": pieces,
        "similarity": {
            "before": round(shard_similarity(vectors, layout.shard_of_place[places]), 4),
            "after": round(shard_similarity(vectors, shard_of_rows(rows)), 4),
        },
        "first": layout.info["source"].get("first", layout.info["source"]),
    }
    return rewrite(store, layout, shards, source, cluster)


def shards_by_similarity(
    layout: Layout,
    vectors: Float32,
    embeddings: Embeddings,
    graph: NeighbourGraph,
    settings: TrainSettings,
    run: RunTasks = map,
) -> Spread:
    """Order the graph's places by similarity, and spread each shard over the order as far as the settings allow.

    Args:
        layout: The layout that holds the places.
        vectors: (N, D) L2-normalised vectors of the graph's places.
        embeddings: The embeddings that the graph came from.
        graph: The neighbour graph.
        settings: Settings of the plans to come.
        run: Runs the tasks of :func:`similarity_order`, as its ``map_fn``.

    Returns:
        The rows (of the graph's places) of each shard, and the number of pieces in a shard.
    """
    weight = np.bincount(layout.members["place"].to_numpy(), tar_bytes(layout.members), layout.n_places)
    in_shard = np.bincount(layout.shard_of_place, weight)[np.unique(layout.shard_of_place[graph.places])]
    sizes = weight[graph.places].astype(np.int64)
    ordered = similarity_order(smoothed(vectors, graph.rows(NEAR)), sizes, float(in_shard.mean()), run)
    reachable = reachable_by_shards(layout, graph, embeddings, settings)
    return spread_out(ordered, sizes, reachable, settings.plan.hardness)


def place_vectors(embeddings: Embeddings, places: Int32) -> Float32:
    """Average the embeddings of each place: its tile's vector and the mean of its views' vectors.

    Embeddings are read block by block, so memory holds only the result and one block.

    Args:
        embeddings: Embeddings of the training set.
        places: (N,) sorted place ids, each with a training pair.

    Returns:
        (N, D) L2-normalised.
    """
    mean = np.zeros((len(places), embeddings.dim), dtype=np.float32)
    counts = np.bincount(np.searchsorted(places, embeddings.pairs.place), minlength=len(places)).astype(np.float32)
    for array, of, share in (
        (embeddings.query, embeddings.pairs.place, 1 / counts),
        (embeddings.reference, embeddings.reference_place, np.ones(len(places), dtype=np.float32)),
    ):
        row = np.minimum(np.searchsorted(places, of), len(places) - 1)
        wanted = places[row] == of
        for start in range(0, len(of), SHARD_ROWS):
            block = read_rows(array, start, start + SHARD_ROWS)[wanted[start : start + SHARD_ROWS]]
            rows, first = np.unique(
                row[start : start + SHARD_ROWS][wanted[start : start + SHARD_ROWS]], return_index=True
            )
            if len(rows):
                mean[rows] += np.add.reduceat(block, first) * share[rows, None]
    mean /= np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), np.float32(1e-12))
    return mean


def _without_pairs(layout: Layout, places: Int32) -> list[Int32]:
    """Return all places but ``places``, in their old order, cut where their shards ended."""
    in_order = _in_order(layout)
    return _by_shard(in_order[~np.isin(in_order, places)], layout)


def _in_order(layout: Layout) -> Int32:
    """Return (N,) all place ids in their order on disk."""
    members: Int32 = layout.members["place"].to_numpy()  # sorted by shard and offset
    return members[np.sort(np.unique(members, return_index=True)[1])]


def _by_shard(places: Int32, layout: Layout) -> list[Int32]:
    """Cut places, which are in their order on disk, into those of each shard."""
    cuts = np.flatnonzero(np.diff(layout.shard_of_place[places])) + 1
    return [part for part in np.split(places, cuts) if len(part)]


def describe(before: Layout, after: Layout) -> list[dict[str, object]]:
    """Describe the result of a reclustering as rows of a table.

    Args:
        before: The layout that was reclustered.
        after: The new layout, or ``before`` if nothing changed.

    Returns:
        A row for each of the two layouts (one if they are the same). "likeness in a shard" is the mean cosine of two
        training places of one shard.
    """
    alike = after.info["source"].get("similarity", {})
    same = before.id == after.id
    return [
        {
            "layout": layout.name,
            "generation": layout.generation,
            "id": layout.id,
            "shards": len(layout.shard_names),
            "MB": round(float(layout.shard_sizes.sum()) / 1e6, 1),
            "pieces of a shard": layout.info["source"].get("pieces"),
            "likeness in a shard": alike.get(when),
        }
        for layout, when in ([(after, "after")] if same else [(before, "before"), (after, "after")])
    ]
