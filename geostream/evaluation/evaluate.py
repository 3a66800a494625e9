"""Compute the retrieval metrics of a split from its embeddings on the store.

The queries are cut into pieces. Each piece holds the vectors of its queries and of their positives, and reads the
gallery once, one Zarr shard at a time. Pieces run on a Dask cluster, or in a few threads of this process.

What a thread holds does not grow with the gallery, nor with the number of queries: 4 × D bytes for each of POSITIVES
queries and as many positives, three blocks of SHARD_ROWS vectors while one is read, and what
:func:`~geostream.evaluation.ranks.rank_positives` holds beside its arguments. With 1024 dimensions these are 200 MB a
thread. What grows are a few numbers for each embedded view and tile: 200 bytes at most, the layout's index not counted.

100,000 queries read the gallery 14 times. That is a few percent of the time that comparing takes. Where the layout has
coordinates, the gallery is searched once more for the figures in metres.

:mod:`geostream.evaluation.protocols` says which candidates are positives, :mod:`geostream.evaluation.ranks` ranks them,
and :mod:`geostream.evaluation.metrics` makes metrics of the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
import zarr
from joblib import cpu_count
from threadpoolctl import threadpool_limits

from geostream.arrays import Csr, Float32, Int32, Int64, take
from geostream.dask import give_back, run_tasks
from geostream.evaluation.metres import DEPTHS, distances, metre_figures
from geostream.evaluation.metrics import hit_rate, measures
from geostream.evaluation.protocols import TO_TILE, Search, searches, view_positions
from geostream.evaluation.ranks import Ranks, rank_positives
from geostream.layout import Layout
from geostream.mining.embeddings import SHARD_ROWS, Embeddings, open_embeddings, read_rows
from geostream.mining.gps import points_in_metres
from geostream.mining.topk import References, merge, most_similar, no_finds
from geostream.progress import Bar
from geostream.store import Store

Task = TypeVar("Task")
Found = TypeVar("Found")
POSITIVES = 8192  # of a piece, at most; a query with more is a piece by itself
THREADS = min(4, cpu_count())  # of this process; the matrix products within them share the other cores


@dataclass(frozen=True)
class Evaluation:
    """Hold the metrics of a split: those of the headline protocol, and the rows of the others.

    Attributes:
        r1: Fraction of queries, 0 to 1, whose best positive ranks first; ``r5`` and ``r10`` likewise.
        r1pct: The same for the first percent of the gallery.
        hit_rate: VIGOR's, see :func:`~geostream.evaluation.metrics.hit_rate`.
        gallery: Number of candidates.
        queries: Number of queries.
        protocol: Name of the headline protocol.
        others: Rows of the other protocols, as :func:`~geostream.evaluation.metrics.measures` returns them.
        metres: Figures on the ground (:mod:`geostream.evaluation.metres`); empty where no query's position is known.
    """

    r1: float
    r5: float
    r10: float
    r1pct: float
    hit_rate: float
    gallery: int
    queries: int
    protocol: str
    others: list[dict[str, Any]]  # not a tuple: a record is the same before and after JSON
    metres: dict[str, float] = field(default_factory=dict)


class QueryPiece(NamedTuple):
    """Hold some queries of a search.

    Attributes:
        first: Index of their first positive among all positives of the search.
        queries: As in :class:`~geostream.evaluation.protocols.Search`; so are ``positives`` and ``ignored``.
    """

    first: int
    queries: Int64
    positives: Csr
    ignored: Csr


class Ranked(NamedTuple):
    """Hold the ranks of one protocol's search."""

    protocol: str
    search: Search
    ranks: Ranks


def evaluate_embeddings(layout: Layout, embeddings: Embeddings, cluster: str | None = None) -> Evaluation:
    """Compute the metrics of the embedded split by all protocols of the layout.

    Args:
        layout: The layout that the embeddings are of.
        embeddings: Committed embeddings of the split.
        cluster: URL of a Dask scheduler whose workers reach the store; None: threads of this process.

    Raises:
        StaleArtefact: The embeddings are of other pairs than the split's.
        BadInput: There are no queries, or a protocol cannot be applied to the layout.
        GeostreamError: The scheduler cannot be reached.
    """
    ranked = rank_embeddings(layout, embeddings, cluster)
    return replace(summed_up(ranked), metres=measure_metres(layout, embeddings, ranked[0].search, cluster))


def rank_embeddings(layout: Layout, embeddings: Embeddings, cluster: str | None = None) -> list[Ranked]:
    """Rank the positives of all queries by all protocols, the headline first; see :func:`evaluate_embeddings`."""
    ranked = dict[int, Ranks]()
    found = []
    for protocol, search in searches(layout, embeddings.split, embeddings.pairs, embeddings.reference_place):
        if id(search) not in ranked:
            ranked[id(search)] = rank_search(embeddings, search, cluster)
        found.append(Ranked(protocol, search, ranked[id(search)]))
    return found


def summed_up(ranked: Sequence[Ranked]) -> Evaluation:
    """Compute the metrics from the ranks of all protocols.

    Args:
        ranked: What :func:`rank_embeddings` returned.
    """
    head, *_ = rows = [measures(*one) for one in ranked]
    others = rows[0 if "ap" in head else 1 :]
    names = ("r1", "r5", "r10", "r1pct", "gallery", "queries", "protocol")
    headline = {name: head[name] for name in names}
    return Evaluation(**headline, hit_rate=hit_rate(ranked[0].search, ranked[0].ranks), others=others)


def measure_metres(
    layout: Layout, embeddings: Embeddings, search: Search, cluster: str | None = None
) -> dict[str, float]:
    """Measure on the ground how far the first tiles are from where the queries were taken. Reads the gallery again.

    Args:
        layout: The layout that the embeddings are of.
        embeddings: Committed embeddings of the split.
        search: The search of the views for their tiles.
        cluster: URL of a Dask scheduler whose workers reach the store; None: threads of this process.

    Returns:
        The figures; none where the layout has no coordinates, or no query has.

    Raises:
        GeostreamError: The scheduler cannot be reached.
    """
    if layout.coordinates == "none":
        return {}
    taken = points_in_metres(view_positions(layout, embeddings.split), layout.coordinates)
    known = np.flatnonzero(np.isfinite(taken).all(axis=1))
    if not len(known):
        return {}
    tiles = points_in_metres(layout.position[embeddings.reference_place], layout.coordinates)
    metres = np.empty((len(known), min(max(DEPTHS), len(tiles))))
    todo = [(start, search.queries[known[start : start + POSITIVES]]) for start in range(0, len(known), POSITIVES)]
    work = partial(_find_piece, embeddings.run, embeddings.name, metres.shape[1])
    with Bar(f"metres {embeddings.split}", len(todo)) as bar:
        for start, rows in _done(work, todo, cluster):
            queries = slice(start, start + len(rows))
            metres[queries] = distances(taken[known[queries]], tiles[rows])
            bar.advance()
    return metre_figures(metres)


def rank_search(embeddings: Embeddings, search: Search, cluster: str | None = None) -> Ranks:
    """Rank the positives of all queries of a search.

    Args:
        embeddings: Committed embeddings of both sides.
        search: The queries and their positives.
        cluster: URL of a Dask scheduler whose workers reach the store; None: threads of this process.

    Raises:
        GeostreamError: The scheduler cannot be reached.
    """
    wrong, not_ignored = np.empty((2, len(search.positives.indices)), dtype=np.int64)
    todo = query_pieces(search)
    work = partial(_rank_piece, embeddings.run, embeddings.name, search.direction)
    with Bar(f"evaluate {embeddings.split} {search.direction}", len(todo)) as bar:
        for first, ranks in _done(work, todo, cluster):
            of_piece = slice(first, first + len(ranks.wrong))
            wrong[of_piece], not_ignored[of_piece] = ranks
            bar.advance()
    return Ranks(wrong, not_ignored)


def query_pieces(search: Search) -> list[QueryPiece]:
    """Cut the queries of a search into pieces of at most POSITIVES positives, or of one query.

    The pieces are about equal, and each of the THREADS threads gets as many: else the last would work alone.
    """
    indptr, cut = search.positives.indptr, [0]
    rounds = -(-int(indptr[-1]) // (POSITIVES * THREADS))
    most = -(-int(indptr[-1]) // (rounds * THREADS))
    while cut[-1] < len(search.queries):
        cut.append(max(cut[-1] + 1, int(np.searchsorted(indptr, indptr[cut[-1]] + most, side="right")) - 1))
    some = [np.arange(a, b) for a, b in pairwise(cut)]
    return [
        QueryPiece(int(indptr[s[0]]), search.queries[s], take(search.positives, s), take(search.ignored, s))
        for s in some
    ]


def _done(
    work: Callable[[Task], tuple[int, Found]], todo: Sequence[Task], cluster: str | None
) -> Iterator[tuple[int, Found]]:
    if cluster is not None:
        yield from run_tasks(cluster, work, todo, "evaluate-queries")
        return
    # BLAS starts a thread for each core of the machine, in each of our threads. They would wait for one another.
    with threadpool_limits(max(1, cpu_count() // THREADS), "blas"), ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(work, todo)


def _rank_piece(run: Store, name: str, direction: str, piece: QueryPiece) -> tuple[int, Ranks]:
    """Run as a task: return the index of the piece's first positive, and the ranks of its positives."""
    give_back()
    embeddings = open_embeddings(run, name, None)
    asking, gallery = embeddings.query, embeddings.reference
    if direction != TO_TILE:
        asking, gallery = gallery, asking
    rows, which = np.unique(piece.positives.indices, return_inverse=True)
    positive = _vectors(gallery, rows.astype(np.int64))
    if len(rows) < len(which) or (np.diff(which) < 0).any():
        positive = positive[which]
    blocks = (
        (start, read_rows(gallery, start, start + SHARD_ROWS)) for start in range(0, gallery.shape[0], SHARD_ROWS)
    )
    query = _vectors(asking, piece.queries)
    return piece.first, rank_positives(query, positive, piece.positives, piece.ignored, blocks)


def _find_piece(run: Store, name: str, k: int, piece: tuple[int, Int64]) -> tuple[int, Int32]:
    """Run as a task: return the number of the piece's first query, and the (n, k) rows of the most similar tiles."""
    give_back()
    embeddings, (first, queries) = open_embeddings(run, name, None), piece
    query, best = _vectors(embeddings.query, queries), no_finds(len(queries), k)
    for start in range(0, embeddings.reference.shape[0], SHARD_ROWS):
        block = read_rows(embeddings.reference, start, start + SHARD_ROWS)
        rows = np.arange(start, start + len(block), dtype=np.int32)
        best = merge(best, most_similar(query, References(rows, block), k))
    return first, best.other


def _vectors(array: zarr.Array[Any], rows: Int64) -> Float32:
    """Read rows, sorted and distinct, from one Zarr shard at a time.

    Zarr would read ten shards at once. And to pick single rows takes it sixteen times their memory.
    """
    cuts = np.flatnonzero(np.diff(rows // SHARD_ROWS)) + 1
    vectors = np.empty((len(rows), array.shape[1]), dtype=np.float32)
    for start, stop in pairwise([0, *cuts.tolist(), len(rows)]):
        first, last = rows[[start, stop - 1]].tolist()
        vectors[start:stop] = read_rows(array, first, last + 1)[rows[start:stop] - first]
    return vectors
