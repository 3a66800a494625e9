"""Drop candidates from mined lists that are likely no negatives: those about as similar as the query's own tile.

A candidate is dropped if its similarity to a place is above ``positive_margin`` times the place's similarity to its own
tile ("TopK-PercPos" of NV-Retriever, Moreira et al. 2024, section 3; 0.95 there). As everywhere in a neighbour graph,
the similarity of a place to a tile is that of its most similar view. A similarity to the own tile of 0 or less says
nothing, so then nothing is dropped.

The dropped are the first of a list. So the search looks for :func:`depth` candidates, twice as many as are wanted: a
list stays full unless more than K candidates are dropped, and is padded otherwise. What is dropped depends on the
embeddings only, not on workers or blocks. Beside the deeper search, whose finds take twice the memory, each vector is
read once more.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from geostream.arrays import Float32, Int64, distinct
from geostream.mining.embeddings import Embeddings, read_rows
from geostream.mining.topk import TopK, no_finds

#: What is counted: candidates that were dropped, places that lost any, those whose list is shorter for it, and those
#: whose list is empty.
LOST = ("dropped", "touched", "short", "empty")


def depth(k: int, margin: float) -> int:
    """Return how many candidates to search so that K are left.

    Args:
        k: Neighbours that are wanted.
        margin: As :func:`kept`'s; 0: nothing is dropped.
    """
    return 2 * k if margin else k


def kept(
    embeddings: Embeddings, margin: float, first: int, last: int, found: TopK, k: int
) -> tuple[TopK, Counter[str]]:
    """Return the lists of the places of some consecutive queries, without likely false negatives.

    Args:
        embeddings: The embeddings that were searched.
        margin: Share of the own tile's similarity, above which a candidate is dropped; 0: nothing is.
        first: First row of the queries.
        last: Row behind their last.
        found: The :func:`depth` best finds of each of their places.
        k: Neighbours that are wanted.

    Returns:
        The lists, and the counts of :data:`LOST`.
    """
    if not margin:
        return found, Counter()
    own = own_scores(embeddings, first, last)
    left, dropped = drop_above(found, np.where(own > 0, np.float32(margin) * own, np.inf), k)
    short, empty = ((dropped > 0) & (left.other[:, at] < 0) for at in (-1, 0))
    counts = dropped.sum(), (dropped > 0).sum(), short.sum(), empty.sum()
    return left, Counter(dict(zip(LOST, map(int, counts), strict=True)))


def own_scores(embeddings: Embeddings, first: int, last: int) -> Float32:
    """Return the similarity of each place to its own tile: that of its most similar view.

    Args:
        embeddings: The embeddings.
        first: First row of the places' queries.
        last: Row behind their last.

    Returns:
        (n,) cosines; 0 for a place whose tile is not among the references.
    """
    place = embeddings.pairs.place[first:last]
    places = distinct(place)
    start, stop = np.searchsorted(embeddings.reference_place, [places[0], places[-1] + 1]).tolist()
    ids, tiles = embeddings.reference_place[start:stop], read_rows(embeddings.reference, start, stop)
    at = np.minimum(np.searchsorted(ids, place), max(len(ids) - 1, 0))
    known = ids[at] == place if len(ids) else np.zeros(len(place), dtype=bool)
    score = np.zeros(len(place), dtype=np.float32)
    score[known] = np.einsum("ij,ij->i", read_rows(embeddings.query, first, last)[known], tiles[at[known]])
    best: Float32 = np.maximum.reduceat(score, np.searchsorted(place, places))
    return best


def drop_above(found: TopK, limit: Float32, k: int) -> tuple[TopK, Int64]:
    """Drop the finds above each row's limit, and keep the next K.

    Args:
        found: Finds of n rows, best first.
        limit: (n,) highest score that is kept.
        k: How many finds of a row are kept.

    Returns:
        (n, k) finds, and (n,) how many were dropped.
    """
    dropped: Int64 = (found.score > limit[:, None]).sum(axis=1)
    at = dropped[:, None] + np.arange(k)
    there, left = at < found.other.shape[1], no_finds(len(limit), k)
    row, column = np.nonzero(there)
    left.other[row, column], left.score[row, column] = found.other[row, at[there]], found.score[row, at[there]]
    return left, dropped
