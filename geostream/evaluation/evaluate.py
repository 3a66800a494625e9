"""Retrieval metrics of a split from its embeddings on the store, computed piece by piece.

Decides how the work is cut: a piece is some queries, whose vectors it holds, and it reads the gallery once, a Zarr
shard at a time. Pieces run on a Dask cluster where there is one, else in a few threads of this process, each of which
holds five blocks of vectors (170 MB at 1024 dimensions) and never more than a strip of similarities. 100,000 queries on
100,000 candidates read the gallery 13 times, which is 2 % of what comparing takes. Two cores take minutes.

What is right: :mod:`geostream.evaluation.protocols`; what stands before it: :mod:`geostream.evaluation.ranks`; what is
made of that: :mod:`geostream.evaluation.metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from joblib import cpu_count

from geostream.arrays import Csr, Int64, take
from geostream.dask import give_back, run_tasks
from geostream.evaluation.metrics import hit_rate, measures
from geostream.evaluation.protocols import TO_TILE, Search, searches
from geostream.evaluation.ranks import Before, count_before
from geostream.layout import Layout
from geostream.mining.embeddings import SHARD_ROWS, Embeddings, open_embeddings, pick_rows, read_rows
from geostream.progress import Bar
from geostream.store import Store

ANSWERS = 8192  # right answers of a piece; a query of more is a piece by itself
THREADS = min(4, cpu_count())  # of this process; the matrix products within them use the other cores


@dataclass(frozen=True)
class Evaluation:
    """The headline, shares of queries 0…1, and the rows of results beside it as :func:`measures` makes them."""

    r1: float
    r5: float
    r10: float
    r1pct: float
    hit_rate: float
    gallery: int
    queries: int
    protocol: str
    others: list[dict[str, Any]]  # not a tuple: a record is the same before and after JSON


class Piece(NamedTuple):
    """Some queries of a search; fields as the search's."""

    first: int  # of their right answers, flat
    queries: Int64
    truths: Csr
    allowed: Csr


def evaluate_embeddings(layout: Layout, embeddings: Embeddings, cluster: str | None = None) -> Evaluation:
    """The metrics of the embedded split by all protocols of the layout.

    ``cluster``: URL of a Dask scheduler; None: threads of this process. Raises as :func:`searches` and
    :func:`run_tasks` do.
    """
    rows, counted = [], dict[int, Before]()
    for protocol, search in searches(layout, embeddings.split, embeddings.pairs, embeddings.reference_place):
        if id(search) not in counted:
            counted[id(search)] = count(embeddings, search, cluster)
        rows.append((measures(protocol, search, counted[id(search)]), search))
    head, search = rows[0]
    others = [row for row, _ in rows[0 if "ap" in head else 1 :]]
    names = ("r1", "r5", "r10", "r1pct", "gallery", "queries", "protocol")
    headline = {name: head[name] for name in names}
    return Evaluation(**headline, hit_rate=hit_rate(search, counted[id(search)]), others=others)


def count(embeddings: Embeddings, search: Search, cluster: str | None = None) -> Before:
    """How many wrong candidates stand before each right answer of a search."""
    every, barred = np.empty((2, len(search.truths.indices)), dtype=np.int64)
    todo = pieces(search)
    work = partial(_count_piece, embeddings.run, embeddings.name, search.direction)
    with Bar(f"evaluate {embeddings.split} {search.direction}", len(todo)) as bar:
        for first, before in _done(work, todo, cluster):
            of_piece = slice(first, first + len(before.every))
            every[of_piece], barred[of_piece] = before
            bar.advance()
    return Before(every, barred)


def pieces(search: Search) -> list[Piece]:
    """The queries of a search as pieces of at most ANSWERS right answers, or of one query."""
    indptr, cut = search.truths.indptr, [0]
    while cut[-1] < len(search.queries):
        cut.append(max(cut[-1] + 1, int(np.searchsorted(indptr, indptr[cut[-1]] + ANSWERS, side="right")) - 1))
    some = [np.arange(a, b) for a, b in pairwise(cut)]
    return [Piece(int(indptr[s[0]]), search.queries[s], take(search.truths, s), take(search.allowed, s)) for s in some]


def _done(
    work: Callable[[Piece], tuple[int, Before]], todo: Sequence[Piece], cluster: str | None
) -> Iterator[tuple[int, Before]]:
    if cluster is not None:
        yield from run_tasks(cluster, work, todo)
        return
    with ThreadPoolExecutor(THREADS) as threads:
        yield from threads.map(work, todo)


def _count_piece(run: Store, name: str, direction: str, piece: Piece) -> tuple[int, Before]:
    """A task: where the piece's answers begin, and what stands before each."""
    give_back()
    embeddings = open_embeddings(run, name, None)
    asking, gallery = embeddings.query, embeddings.reference
    if direction != TO_TILE:
        asking, gallery = gallery, asking
    rows, which = np.unique(piece.truths.indices, return_inverse=True)
    right = pick_rows(gallery, rows.astype(np.int64))[which]
    blocks = (
        (start, read_rows(gallery, start, start + SHARD_ROWS)) for start in range(0, gallery.shape[0], SHARD_ROWS)
    )
    query = pick_rows(asking, piece.queries)
    return piece.first, count_before(query, right, piece.truths, piece.allowed, blocks)
