"""Recluster a layout: write its next generation, with the shards in the order of similarity.

Training places are ordered by the mean of their tile's and views' embeddings, after these means are moved towards their
neighbours in the graph (:mod:`geostream.planning.smoothing`). There are about as many shards as before, each made of
pieces from all over the order (:mod:`geostream.planning.spreading`). Places without training pairs have no embedding.
They keep their order and are kept apart from training places, because training would read them for nothing.

Finding the order takes seconds (:mod:`geostream.reclustering.order`); rewriting reads and writes every byte once
(:mod:`geostream.reclustering.rewrite`).

Where there are at most PAIRS pairs and VECTOR_BYTES of place vectors, they are ordered in memory. This takes 4 ·
VECTOR_BYTES (1 GiB) beside layout and graph. Otherwise the vectors stay on the store, and Dask tasks smooth and order
them (:mod:`geostream.reclustering.external`, which states its bounds); the order is the same. The number of pieces is
then chosen on a part of the order (:mod:`geostream.reclustering.trial`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import dask
import numpy as np

from geostream.arrays import Int32, Int64, Integers, distinct
from geostream.dask import connected, in_turn, run_tasks
from geostream.errors import BadInput, StaleArtefact
from geostream.layout import Layout, advance
from geostream.mining.embeddings import Embeddings
from geostream.mining.graph import NeighbourGraph
from geostream.planning.make_plan import reachable_by_shards
from geostream.planning.smoothing import NEAR, ROUNDS, smoothed
from geostream.planning.spreading import shard_of_rows, spread_out
from geostream.reclustering.external import external_order, prepare, unsmoothed
from geostream.reclustering.means import place_vectors
from geostream.reclustering.order import shard_similarity, similarity_order
from geostream.reclustering.rewrite import bytes_of_places, rewrite
from geostream.reclustering.scratch import Apply, Scratch
from geostream.reclustering.trial import spread_by_trial
from geostream.settings import TrainSettings
from geostream.store import Store

PAIRS = 2**18  # most pairs of which plans are tried in memory
VECTOR_BYTES = 2**28  # most bytes of place vectors, of four bytes a number, that are held in memory
THREADS = 4  # most tasks at a time where they run within this process: 4 · 435 MB
LIKENESS_BYTES = 2**25  # most bytes of the vectors by which the likeness of a large order is estimated


class Order(NamedTuple):
    """The similarity order of the training places.

    Attributes:
        shards: Rows (of the graph's places) of each new shard, in order.
        pieces: Number of pieces of the order in a shard.
        before: Mean cosine of two training places of one shard of the old generation.
        after: The same for the new shards. Of a large order some shards are measured.
    """

    shards: list[Integers]
    pieces: int
    before: float
    after: float


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
    same generation was written before, nothing is written and it is opened. A call that was killed is continued. Where
    ``layout`` is the data set's current one, the new layout becomes so.

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
        NotFound: Another reclustering by the same graph has removed what both wrote on the store; run it again.
        StoreError: A member is damaged, or the store cannot be read or written.
    """
    if embeddings.places_id != layout.places_id:
        raise StaleArtefact(f"{embeddings.name}: made from other places than those of {layout.name}; embed again")
    if embeddings.split != "train":
        raise BadInput(f"{embeddings.name}: of split {embeddings.split!r}; a layout is ordered by the training set's")
    if graph.places_id != layout.places_id:
        raise StaleArtefact(f"graph {graph.name}: made from other places than those of {layout.name}; mine again")
    if graph.embeddings != embeddings.name:
        raise StaleArtefact(f"graph {graph.name} came from {graph.embeddings}, not from {embeddings.name}; mine again")
    order = order_places(layout, embeddings, graph, settings, cluster)
    shards = [*(graph.places[rows] for rows in order.shards), *_without_pairs(layout, graph.places)]
    old = _by_shard(_in_order(layout), layout)
    if len(shards) == len(old) and all(map(np.array_equal, shards, old)):
        return layout
    source = {
        "made_from": layout.name,
        "run": run_name,
        "embeddings": embeddings.name,
        "checkpoint": embeddings.checkpoint,
        "pieces": order.pieces,
        "similarity": {"before": round(order.before, 4), "after": round(order.after, 4)},
        "first": layout.info["source"].get("first", layout.info["source"]),
    }
    after = rewrite(store, layout, shards, source, cluster)
    advance(store, layout.dataset, after, layout.id)
    return after


def order_places(
    layout: Layout, embeddings: Embeddings, graph: NeighbourGraph, settings: TrainSettings, cluster: str | None = None
) -> Order:
    """Order the graph's places by similarity, and spread each shard over the order as far as the settings allow.

    Args:
        layout: The layout that holds the places.
        embeddings: Embeddings of its training set.
        graph: The neighbour graph of these embeddings. A large one is read from the store, beside its places.
        settings: Settings of the plans to come.
        cluster: URL of a Dask scheduler whose workers reach the store; None works within this process.
    """
    import distributed.config  # noqa: F401  # loads its defaults before some are changed for a while

    n, pairs = len(graph.places), len(embeddings.pairs)
    order = _in_memory if pairs <= PAIRS and 4 * n * embeddings.dim <= VECTOR_BYTES else _on_the_store
    # The vectors, or what the tasks need to find them, are sent with the tasks, of which Dask would warn.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TB"}):
        return order(layout, embeddings, graph, settings, cluster)


def _in_memory(
    layout: Layout, embeddings: Embeddings, graph: NeighbourGraph, settings: TrainSettings, cluster: str | None
) -> Order:
    """Order the places, with all vectors in memory."""
    sizes, target = _sizes(layout, graph.places)
    vectors = place_vectors(embeddings, graph.places)
    map_fn = partial(run_tasks, cluster, stage="recluster-subtree")
    ordered = similarity_order(smoothed(vectors, graph.rows(NEAR)), sizes, target, map_fn)
    reachable = reachable_by_shards(layout, graph, embeddings, settings)
    spread = spread_out(ordered, sizes, reachable, settings.plan.hardness)
    before, after = layout.shard_of_place[graph.places], shard_of_rows(spread.shards)
    return Order(*spread, shard_similarity(vectors, before), shard_similarity(vectors, after))


def _on_the_store(
    layout: Layout, embeddings: Embeddings, graph: NeighbourGraph, settings: TrainSettings, cluster: str | None
) -> Order:
    """Order the places, with the vectors on the store."""
    places = graph.places
    sizes, target = _sizes(layout, places)
    scratch = Scratch.of(embeddings.run, embeddings.name, graph.name, len(places), embeddings.dim, ROUNDS)
    scratch.drop()
    with connected(cluster, THREADS) as client:

        def apply(work: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
            name = getattr(work, "func", work).__name__.replace("_", "-").strip("-")
            return in_turn(client, f"recluster-{name}", work, ((task,) for task in tasks))

        prepare(scratch, embeddings, places, apply)
        ordered = external_order(scratch, sizes, target, apply)
        spread = spread_by_trial(scratch, layout, embeddings, places, ordered, sizes, settings, apply)
        likeness = [_likeness(scratch, layout.shard_of_place[places], apply)]
        likeness.append(_likeness(scratch, shard_of_rows(spread.shards), apply))
    scratch.drop()
    return Order(*spread, *likeness)


def _sizes(layout: Layout, places: Int32) -> tuple[Int64, float]:
    """Return (N,) the bytes of the places, and the mean bytes of the shards that hold them."""
    weight = bytes_of_places(layout)
    stored = layout.shard_of_place >= 0
    in_shard = np.bincount(layout.shard_of_place[stored], weight[stored])[distinct(layout.shard_of_place[places])]
    return weight[places], float(in_shard.mean())


def _likeness(scratch: Scratch, shard: Int32, apply: Apply) -> float:
    """Return the mean cosine of two places of one shard, over some shards at equal distances in their order.

    Args:
        scratch: The vectors on the store.
        shard: (N,) number of each row's shard.
        apply: Runs the tasks.
    """
    numbers = distinct(shard)
    count = LIKENESS_BYTES * len(numbers) // (4 * scratch.dim * scratch.n)
    chosen = np.zeros(int(numbers[-1]) + 2, dtype=bool)  # the last entry is for -1, no shard
    chosen[numbers[np.linspace(0, len(numbers) - 1, max(1, count)).astype(int)]] = True
    rows = np.flatnonzero(chosen[shard])
    return shard_similarity(unsmoothed(scratch, rows, apply), shard[rows])


def _without_pairs(layout: Layout, places: Int32) -> list[Int32]:
    """Return all places but ``places``, in their old order, cut where their shards ended."""
    in_order, trained = _in_order(layout), np.zeros(layout.n_places, dtype=bool)
    trained[places] = True
    return _by_shard(in_order[~trained[in_order]], layout)


def _in_order(layout: Layout) -> Int32:
    """Return the ids of all places that were not removed, in their order on disk."""
    place = layout.members["place"].to_numpy()  # sorted by shard and offset
    first = np.full(layout.n_places, -1, dtype=np.int64)
    first[place[::-1]] = np.arange(len(place))[::-1]  # the last value that is written to a place stays: its first row
    stored = np.flatnonzero(first >= 0)
    return stored[np.argsort(first[stored])].astype(np.int32)


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
