"""Neighbour graphs: for each training place the K others that are hardest to tell from it.

``gps``: the K nearest by great circle or plane, with one tree per area; areas are never compared, because places of two
cities are no hard negatives by distance. ``visual``: the K most similar by embedding, exact, as Dask tasks of one block
of places each, which runs through the references block by block with FAISS. A task holds one block of either side and
its own result, whatever N is; it writes its own Zarr shards, so it can be run again when a worker dies.
A place itself and its semi-positives never appear among its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.neighbors import KDTree

from geostream.errors import BadInput, StaleArtefact
from geostream.layout import Csr, Int32, Int64, Layout
from geostream.mining.cluster import run_tasks
from geostream.mining.embeddings import Embeddings, Float32, open_embeddings, read_rows
from geostream.mining.graph import GPS_GRAPH, SHARD_ROWS, GraphWriter, NeighbourGraph, open_graph
from geostream.progress import track
from geostream.store import Store

Float64 = npt.NDArray[np.float64]

EARTH_RADIUS = 6_371_008.8  # metres, mean
REFERENCE_BLOCK = 32_768  # references that a task holds: 128 MiB at 1024 dimensions
TREE_BLOCK = 4_000_000  # distances held at once


def points_in_metres(position: Float64, coordinates: str) -> Float64:
    """Places as points whose straight distance is their distance: (N, 2) for UTM, (N, 3) on the sphere for lat/lon.

    The chord orders places as the arc does, and is shorter by less than 1 mm up to 9 km.
    """
    if coordinates == "utm":
        return position
    north, east = np.radians(position).T
    return EARTH_RADIUS * np.stack([np.cos(north) * np.cos(east), np.cos(north) * np.sin(east), np.sin(north)], axis=1)


def build_gps_graph(run: Store, layout: Layout, k: int, name: str = GPS_GRAPH) -> NeighbourGraph:
    """The graph of the training places' K nearest, written to the run.

    Raises BadInput for a layout without coordinates.
    """
    if layout.coordinates == "none":
        raise BadInput(f"layout {layout.name} has no coordinates, so no GPS neighbours; begin with strategy=random")
    places = np.unique(layout.pairs("train").place)
    if not np.isfinite(layout.position[places]).all():
        unknown = layout.keys[int(places[~np.isfinite(layout.position[places]).all(axis=1)][0])]
        raise BadInput(f"layout {layout.name}: place {unknown} has no coordinates; begin with strategy=random")
    points = points_in_metres(layout.position[places], layout.coordinates)
    rows, metres = nearest(points, layout.area[places], k, restrict(layout.excluded("train"), places))
    writer = GraphWriter.create(run, name, kind="gps", layout=layout, embeddings="", places=places, k=k)
    indices = np.where(rows >= 0, places[rows], -1).astype(np.int32)
    for start in range(0, len(places), SHARD_ROWS):
        writer.write(start, indices[start : start + SHARD_ROWS], -metres[start : start + SHARD_ROWS])
    writer.commit()
    return open_graph(run, name, layout)


def restrict(lists: Csr, places: Int32) -> Csr:
    """Ragged lists over all place ids as lists over rows of ``places`` (sorted ids); other places fall away."""
    row = np.full(len(lists.indptr) - 1, -1, dtype=np.int32)
    row[places] = np.arange(len(places), dtype=np.int32)
    owner = np.repeat(row, np.diff(lists.indptr))
    other = row[lists.indices]
    keep = (owner >= 0) & (other >= 0)
    counts = np.bincount(owner[keep], minlength=len(places))
    return Csr(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), other[keep])


def _listed(lists: Csr, row: npt.NDArray[np.integer], other: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Whether ``other`` is in the list of ``row``, elementwise."""
    codes = np.repeat(np.arange(len(lists.indptr) - 1), np.diff(lists.indptr)) << 32 | lists.indices
    if not len(codes):
        return np.zeros(np.broadcast(row, other).shape, dtype=bool)
    wanted = row.astype(np.int64) << 32 | other
    found: npt.NDArray[np.bool_] = codes[np.minimum(np.searchsorted(codes, wanted), len(codes) - 1)] == wanted
    return found


def nearest(points: Float64, area: Int32, k: int, excluded: Csr) -> tuple[Int32, Float64]:
    """(N, k) rows of the nearest others within the same area and (N, k) their distances; -1 and inf where none is left.

    ``points`` (N, 2 or 3) in metres; ``excluded``: N lists of rows that are no neighbours. Distances are compared to
    the millimetre, and equal ones by row, so that the graph of a regular grid does not hang on rounding.
    """
    indices = np.full((len(points), k), -1, dtype=np.int32)
    metres = np.full((len(points), k), np.inf)
    enough = k + 1 + int(np.diff(excluded.indptr).max(initial=0))
    for number in np.unique(area):
        rows = np.flatnonzero(area == number).astype(np.int32)
        tree = KDTree(points[rows])
        todo, wanted = rows, enough + 8  # a few more, because ties at the end are looked for again
        while len(todo):
            wanted = min(wanted, len(rows))
            again = []
            for block in np.array_split(todo, -(-len(todo) * wanted // TREE_BLOCK)):
                distance, found = tree.query(points[block], wanted)
                distance, found = np.round(distance, 3), rows[found]
                seen_to = distance[:, -1].copy()
                own = block[:, None]
                distance[(found == own) | _listed(excluded, own, found)] = np.inf
                order = np.lexsort((found, distance), axis=1)[:, :k]
                distance, found = (np.take_along_axis(a, order, axis=1) for a in (distance, found))
                indices[block, : order.shape[1]] = np.where(np.isfinite(distance), found, -1)
                metres[block, : order.shape[1]] = distance
                if wanted < len(rows):
                    again.append(block[distance[:, -1] >= seen_to])
            todo, wanted = np.concatenate([np.zeros(0, dtype=np.int32), *again]), 2 * wanted
    return indices, metres


def build_visual_graph(
    run: Store, name: str, layout: Layout, embeddings: Embeddings, k: int, cluster: str | None = None
) -> NeighbourGraph:
    """The graph of the training places' K most similar, written to the run at ``name``.

    ``cluster``: URL of a Dask scheduler whose workers reach the store; None starts one within this process.
    A place's similarity to another is that of its most similar view. Raises StaleArtefact for embeddings of other
    places, GeostreamError where the scheduler cannot be reached.
    """
    if embeddings.places_id != layout.places_id:
        raise StaleArtefact(f"{embeddings.name}: made from other places than those of {layout.name}; embed again")
    pairs = embeddings.pairs
    places = np.unique(pairs.place)
    excluded = layout.excluded(embeddings.split)
    writer = GraphWriter.create(run, name, kind="visual", layout=layout, embeddings=embeddings.name, places=places, k=k)
    tasks: list[dict[str, Any]] = []
    for start in range(0, len(places), SHARD_ROWS):
        block = places[start : start + SHARD_ROWS]
        first, last = np.searchsorted(pairs.place, [block[0], block[-1] + 1]).tolist()
        of_block = [excluded.row(place) for place in block.tolist()]
        indptr = np.concatenate([[0], np.cumsum([len(row) for row in of_block])]).astype(np.int64)
        lists = Csr(indptr, np.concatenate([np.zeros(0, dtype=np.int32), *of_block]))
        tasks.append({"start": start, "first": first, "last": last, "excluded": lists})
    work = partial(visual_block, url=run.url, name=name, embeddings_name=embeddings.name, k=k)
    for _ in track(run_tasks(cluster, work, tasks), "neighbour graph", len(tasks)):
        pass
    writer.commit()
    return open_graph(run, name, layout)


def visual_block(task: dict[str, Any], *, url: str, name: str, embeddings_name: str, k: int) -> int:
    """A Dask task: the neighbours of one Zarr shard of the graph's places. Returns the number of its places.

    ``task``: row of the graph it starts at, its queries' rows, and per place the place ids that are no neighbours.
    """
    run = Store.open(url)
    embeddings = open_embeddings(run, embeddings_name, None)
    places = np.unique(embeddings.pairs.place)
    first, last, start, excluded = task["first"], task["last"], task["start"], Csr(*task["excluded"])
    block = places[start : start + SHARD_ROWS]
    enough = k + 1 + int(np.diff(excluded.indptr).max(initial=0))
    query = read_rows(embeddings.query, first, last)
    other, score = top_references(query, _references(embeddings, places), enough)
    row = np.repeat(np.searchsorted(block, embeddings.pairs.place[first:last]), other.shape[1])
    other, score = other.ravel(), score.ravel()
    valid = (other >= 0) & (other != block[row]) & ~_listed(excluded, row, other)
    indices, scores = merge_views(row[valid], other[valid], score[valid], len(block), k)
    GraphWriter.reopen(run, name).write(start, indices, scores)
    return len(block)


def _references(embeddings: Embeddings, places: Int32) -> Iterator[tuple[Int32, Float32]]:
    """Blocks of place ids and their vectors; tiles that no training query belongs to are left away."""
    for start in range(0, len(embeddings.reference_place), REFERENCE_BLOCK):
        ids = embeddings.reference_place[start : start + REFERENCE_BLOCK]
        wanted = np.isin(ids, places)
        if wanted.any():
            yield ids[wanted], read_rows(embeddings.reference, start, start + len(ids))[wanted]


def top_references(query: Float32, references: Iterable[tuple[Int32, Float32]], k: int) -> tuple[Int32, Float32]:
    """(Q, k) ids of each query's most similar references and (Q, k) their cosines, over all blocks; -1, -inf for none.

    ``query`` (Q, D); ``references``: blocks of ids (R,) and vectors (R, D); all L2-normalised float32.
    """
    import faiss

    faiss.omp_set_num_threads(1)  # of this thread: Dask has as many task threads as cores
    ids = np.full((len(query), k), -1, dtype=np.int32)
    scores = np.full((len(query), k), -np.inf, dtype=np.float32)
    for block_ids, vectors in references:
        index: Any = faiss.IndexFlatIP(vectors.shape[1])
        if faiss.get_num_gpus() > 0:
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        index.add(np.ascontiguousarray(vectors))
        found_scores, found = index.search(np.ascontiguousarray(query), min(k, len(block_ids)))
        ids = np.concatenate([ids, block_ids[found]], axis=1)
        scores = np.concatenate([scores, found_scores], axis=1)
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        ids, scores = np.take_along_axis(ids, best, axis=1), np.take_along_axis(scores, best, axis=1)
    return ids, scores


def merge_views(row: Int64, other: Int32, score: Float32, n_rows: int, k: int) -> tuple[Int32, Float32]:
    """(n_rows, k) neighbours and (n_rows, k) scores from the finds of all views of each row, hardest first.

    ``row``, ``other``, ``score``: one find each; the same find of several views counts with its best score, equal
    scores are ordered by id.
    """
    code = row.astype(np.int64) << 32 | other
    order = np.argsort(code, kind="stable")
    starts = np.flatnonzero(np.diff(code[order], prepend=-1))
    code = code[order[starts]]
    score = np.maximum.reduceat(score[order], starts) if len(code) else score[:0]
    row, other = code >> 32, (code & 0xFFFFFFFF).astype(np.int32)
    order = np.lexsort((-score, row))  # stable: equal scores stay in the order of ids
    row, other, score = row[order], other[order], score[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = rank < k
    indices = np.full((n_rows, k), -1, dtype=np.int32)
    scores = np.full((n_rows, k), -np.inf, dtype=np.float32)
    indices[row[kept], rank[kept]] = other[kept]
    scores[row[kept], rank[kept]] = score[kept]
    return indices, scores
