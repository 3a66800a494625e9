"""Reclustering, the system's compaction: a layout's next generation, its shards in the order of similarity.

Decides what is put in order: training places, each by the mean of its tile's and of its views' embedding, drawn towards
its neighbours in the graph of these embeddings (:mod:`geostream.planning.smoothing`), in as many shards as before, each
made of pieces from all over the order (:mod:`geostream.planning.spreading`). Places without training pairs have no
embedding; they keep their shards and their order, and share none with training places, because training would read
them for nothing. The order costs seconds (:mod:`geostream.reclustering.order`), the rewrite every byte once
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

SPARE = 0.1  # of hardness: what the bounds on overlap and the graphs to come take away, 0.03 to 0.07 as measured


def recluster(
    store: Store,
    layout: Layout,
    run_name: str,
    embeddings: Embeddings,
    graph: NeighbourGraph,
    settings: TrainSettings,
    cluster: str | None = None,
) -> Layout:
    """The next generation of ``layout``, in the order of its training set's ``embeddings`` and their ``graph``, opened.

    Named ``<root>-g<generation>``; where another order has that name, "-2" and so on is appended. ``run_name``: the run
    the embeddings are of, for ``layout.json``. ``settings``: those of the plans to come; they decide into how many
    pieces a shard is spread over the order. ``cluster``: URL of a Dask scheduler whose workers reach the store; None
    starts one within this process. Done before, it is found, and nothing is written; a ``layout`` that lies in this
    very order is returned itself. ``info["source"]`` of the new layout has ``pieces``, how many runs of the order a
    shard holds, and ``similarity``, the mean cosine of two training places of one shard, before and after. Raises
    StaleArtefact for embeddings of other places, BadInput for those of another split, StoreError where a member is
    damaged.
    """
    if embeddings.places_id != layout.places_id:
        raise StaleArtefact(f"{embeddings.name}: made from other places than those of {layout.name}; embed again")
    if embeddings.split != "train":
        raise BadInput(f"{embeddings.name}: of split {embeddings.split!r}; a layout is ordered by the training set's")
    if graph.embeddings != embeddings.name:
        raise StaleArtefact(f"graph {graph.name} came from {graph.embeddings}, not from {embeddings.name}; mine again")
    places = np.unique(layout.pairs("train").place)
    vectors = place_vectors(embeddings, places)
    import distributed.config  # noqa: F401  # its defaults come first, or what is set for a while takes them along

    # The vectors travel with the tasks: what Dask would warn of is meant.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TB"}):
        rows, pieces = shards_by_similarity(layout, vectors, embeddings, graph, settings, partial(run_tasks, cluster))
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
    """Rows of the graph's places, shard by shard: the order of similarity, spread out as far as ``settings`` allow.

    ``vectors`` (N, D) of these places, ``run`` as in :func:`similarity_order`.
    """
    weight = np.bincount(layout.members["place"].to_numpy(), tar_bytes(layout.members), layout.n_places)
    in_shard = np.bincount(layout.shard_of_place, weight)[np.unique(layout.shard_of_place[graph.places])]
    sizes = weight[graph.places].astype(np.int64)
    ordered = similarity_order(smoothed(vectors, graph.rows(NEAR)), sizes, float(in_shard.mean()), run)
    reachable = reachable_by_shards(layout, graph, embeddings, settings)
    return spread_out(ordered, sizes, reachable, settings.plan.hardness + SPARE)


def place_vectors(embeddings: Embeddings, places: Int32) -> Float32:
    """(N, D) of the ``places`` (sorted ids, each with a pair): the mean of the tile's vector and that of its views.

    L2-normalised. Read block by block: beside the result a block of embeddings is held.
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
    """The other places in their old order, cut where they were."""
    in_order = _in_order(layout)
    return _by_shard(in_order[~np.isin(in_order, places)], layout)


def _in_order(layout: Layout) -> Int32:
    """(N,) all place ids as they lie on disk."""
    members: Int32 = layout.members["place"].to_numpy()  # sorted by shard and offset
    return members[np.sort(np.unique(members, return_index=True)[1])]


def _by_shard(places: Int32, layout: Layout) -> list[Int32]:
    """``places``, in the order on disk, shard by shard."""
    cuts = np.flatnonzero(np.diff(layout.shard_of_place[places])) + 1
    return [part for part in np.split(places, cuts) if len(part)]


def describe(before: Layout, after: Layout) -> list[dict[str, object]]:
    """A table's rows: what the reclustering of ``before`` came to. Likeness: of two training places of one shard."""
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
