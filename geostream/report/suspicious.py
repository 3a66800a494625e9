"""Find training pairs that may be wrong: their query does not come to resemble their own tile.

A network learns the rule of most pairs first, and the few that break it last: a photo with another photo's coordinates,
a tile of another place, a picture of the inside of a car. So a pair counts by its similarity over several epochs, each
compared with that of all pairs in the same epoch; late epochs alone may have learnt wrong pairs by heart (the idea of
Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin Ranking, 2020). The embeddings that mining
has left in the run are enough: nothing is embedded here. To compare with: how similar queries are to tiles of other
places, drawn from the whole set. An epoch counts once most pairs are more similar than nearly all of these. Of a sound
data set the lowest pairs are only hard; the picture tells.

Each query and each tile is read once an epoch, block by block, and the tiles once more to find what the lowest queries
resemble instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from geostream.arrays import Float32, Float64, Int64
from geostream.errors import NotFound, StaleArtefact
from geostream.layout import Layout
from geostream.layout.members import read_image
from geostream.mining.embeddings import SHARD_ROWS, Embeddings, pick_rows, read_rows
from geostream.report.retrievals import thumbnail
from geostream.runs.run import Run

EPOCHS = 3  # the newest embeddings that are looked at
SHOWN = 24
SAMPLE = 512  # queries, and as many tiles, that are compared as strangers
STRANGERS = 0.95  # share of strangers' similarities below which a pair counts as one that resembles a stranger


@dataclass(frozen=True)
class SuspiciousPair:
    """Hold a training pair that stays at the bottom.

    Attributes:
        key: of its place.
        view: number of the view.
        similarity: of the query to its own tile, cosine, in the newest embeddings.
        standing: how it stands to the median of all pairs, see :func:`standings`.
        query: JPEG.
        tile: JPEG, of its own place.
        other: JPEG, of the most similar tile of another place, semi-positives left out.
        other_key: of that place.
        other_similarity: of the query to that tile.
    """

    key: str
    view: int
    similarity: float
    standing: float
    query: bytes
    tile: bytes
    other: bytes
    other_key: str
    other_similarity: float


@dataclass(frozen=True)
class Suspicion:
    """Hold what the embeddings of a run say of its training pairs.

    Attributes:
        epochs: after which the training set was embedded.
        pairs: number of all pairs.
        typical: median similarity of a query and its own tile, in the newest embeddings.
        stranger: similarity below which most tiles of other places lie.
        as_strangers: number of pairs whose own tile lies below that in all epochs.
        shown: the lowest pairs, lowest first.
    """

    epochs: tuple[int, ...]
    pairs: int
    typical: float
    stranger: float
    as_strangers: int
    shown: tuple[SuspiciousPair, ...]


def find_suspicious(run: Run) -> Suspicion | None:
    """Return the training pairs of a run that stay at the bottom; None where the training set was never embedded.

    Args:
        run: the run, on the layout that it ended with.

    Raises:
        StoreError: embeddings or a shard cannot be read.
    """
    found: list[tuple[int, Embeddings]] = []
    for epoch in reversed(run.embedded_epochs()):
        with suppress(NotFound, StaleArtefact):  # of other places, or being written
            embeddings = run.embeddings("train", epoch)
            if not found or len(embeddings.pairs) == len(found[0][1].pairs):
                found.append((epoch, embeddings))
        if len(found) == EPOCHS:
            break
    if not found:
        return None
    measured = [(epoch, *own_similarities(embeddings)) for epoch, embeddings in found]
    # Before the network can tell most pairs from strangers, what is low means nothing.
    told = [one for one in measured if np.median(one[1]) > one[2]] or measured[:1]
    own, strangers = np.stack([similarity for _, similarity, _ in told]), np.array([bound for _, _, bound in told])
    standing = standings(own)
    rows = np.argsort(standing, kind="stable")[:SHOWN]
    newest = dict(found)[told[0][0]]
    return Suspicion(
        epochs=tuple(epoch for epoch, _, _ in reversed(told)),
        pairs=own.shape[1],
        typical=float(np.median(own[0])),
        stranger=float(strangers[0]),
        as_strangers=int((own < strangers[:, None]).all(axis=0).sum()),
        shown=tuple(_shown(run.layout, newest, rows, own[0], standing)),
    )


def standings(own: Float64) -> Float64:
    """Return how each pair's similarity stands to that of all pairs, averaged over the epochs.

    Args:
        own: (E, P) similarity of each pair's query to its own tile, an epoch a row.

    Returns:
        (P,) distances from the median, in median distances of all pairs: 0 is the median, -3 lies far below it.
    """
    apart = own - np.median(own, axis=1, keepdims=True)
    spread = np.median(np.abs(apart), axis=1, keepdims=True)
    standing: Float64 = (apart / np.maximum(spread, 1e-12)).mean(axis=0)
    return standing


def own_similarities(embeddings: Embeddings) -> tuple[Float64, float]:
    """Return how similar each query is to its own tile, and how similar to strangers.

    Args:
        embeddings: of the training set.

    Returns:
        (P,) cosine similarities, and the one below which ``STRANGERS`` of the tiles of other places lie.
    """
    pairs, places = embeddings.pairs, embeddings.reference_place
    rows = np.searchsorted(places, pairs.place)
    own, starts = np.empty(len(pairs)), range(0, len(pairs), SHARD_ROWS)
    sampled: list[tuple[Float32, Float32, Int64]] = []
    for start in starts:
        stop = min(start + SHARD_ROWS, len(pairs))
        first = int(rows[start])
        tiles = read_rows(embeddings.reference, first, int(rows[stop - 1]) + 1)[rows[start:stop] - first]
        queries = read_rows(embeddings.query, start, stop)
        own[start:stop] = np.einsum("pd,pd->p", queries, tiles)
        some = np.linspace(0, stop - start - 1, max(8, SAMPLE // len(starts))).astype(np.int64)
        sampled.append((queries[some], tiles[some], pairs.place[start + some].astype(np.int64)))
    query, tile, place = (np.concatenate(column) for column in zip(*sampled, strict=True))
    strange = (query @ tile.T)[place[:, None] != place[None, :]]
    return own, float(np.quantile(strange, STRANGERS)) if len(strange) else -1.0


def _shown(
    layout: Layout, embeddings: Embeddings, rows: Int64, own: Float64, standing: Float64
) -> Sequence[SuspiciousPair]:
    """Return the pairs in some rows, with their pictures; those with a damaged image are left out."""
    order = np.argsort(rows)
    query = np.empty((len(rows), embeddings.dim), dtype=np.float32)
    query[order] = pick_rows(embeddings.query, rows[order])
    others, similarities = _most_similar(layout, embeddings, rows, query)
    shown = []
    for at, row in enumerate(rows.tolist()):
        place, view = int(embeddings.pairs.place[row]), int(embeddings.pairs.view[row])
        try:
            pictures = [
                thumbnail(read_image(layout, *one)) for one in ((place, view), (place, None), (others[at], None))
            ]
        except (OSError, SyntaxError, ValueError):  # raised by Pillow for damaged images
            continue
        shown.append(
            SuspiciousPair(
                key=layout.key(place),
                view=view,
                similarity=float(own[row]),
                standing=float(standing[row]),
                query=pictures[0],
                tile=pictures[1],
                other=pictures[2],
                other_key=layout.key(others[at]),
                other_similarity=similarities[at],
            )
        )
    return shown


def _most_similar(layout: Layout, embeddings: Embeddings, rows: Int64, query: Float32) -> tuple[list[int], list[float]]:
    """Return for some queries the place of the most similar tile that does not show them, and the similarity."""
    semi = layout.semi_positives("train")
    barred = [{int(embeddings.pairs.place[row]), *semi.row(row).tolist()} for row in rows.tolist()]
    places = embeddings.reference_place
    best, where = np.full(len(rows), -np.inf), np.zeros(len(rows), dtype=np.int64)
    for start in range(0, len(places), SHARD_ROWS):
        tiles = read_rows(embeddings.reference, start, start + SHARD_ROWS)
        similarity = query @ tiles.T
        for at, own in enumerate(barred):
            similarity[at, np.isin(places[start : start + len(tiles)], list(own))] = -np.inf
        column = similarity.argmax(axis=1)
        value = similarity[np.arange(len(rows)), column]
        better = value > best
        best[better], where[better] = value[better], places[start + column[better]]
    return where.tolist(), best.tolist()
