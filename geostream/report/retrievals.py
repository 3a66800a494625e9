"""Pick queries and their best candidates, as small pictures for the report and the evaluation page.

The queries are spread evenly over the split, so that successes and failures appear in their own proportion. Each
picture costs one read from the store. The embeddings of the gallery are read twice, block by block.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from geostream.arrays import Int64, take
from geostream.evaluation.protocols import TO_TILE, Search, searches
from geostream.evaluation.ranks import rank_positives
from geostream.layout import Layout
from geostream.layout.members import read_image
from geostream.mining.embeddings import SHARD_ROWS, Embeddings, pick_rows, read_rows

THUMBNAIL = 192  # pixels of the longer side of a picture


@dataclass(frozen=True)
class Retrieval:
    """Hold one query and its best candidates, the most similar first.

    Attributes:
        direction: ``"view→tile"`` or ``"tile→view"``.
        query: Picture of the query, JPEG.
        candidates: Pictures of the candidates, JPEG.
        similarities: Cosine similarity of each candidate to the query.
        kinds: ``"positive"``, ``"semi-positive"`` (shows the spot, too) or ``"negative"`` for each candidate.
        rank: Rank of the best positive in the whole gallery, from 1. Ties count against the model.
    """

    direction: str
    query: bytes
    candidates: list[bytes]
    similarities: list[float]
    kinds: list[str]
    rank: int


def retrievals(layout: Layout, embeddings: Embeddings, *, count: int = 12, best: int = 5) -> list[Retrieval]:
    """Return queries of the embedded split with their best candidates.

    Args:
        layout: Layout that the embeddings were made from.
        embeddings: Embeddings of one split.
        count: Number of queries for each direction of search.
        best: Number of candidates for each query.

    Returns:
        The queries, direction by direction. A query is left out if it or one of its candidates cannot be decoded.
    """
    told = searches(layout, embeddings.split, embeddings.pairs, embeddings.reference_place)
    found: list[Retrieval] = []
    for direction in dict.fromkeys(search.direction for _, search in told):
        first, *others = (search for _, search in told if search.direction == direction)
        found += _of_search(layout, embeddings, first, others, count, best)
    return found


def _of_search(
    layout: Layout, embeddings: Embeddings, search: Search, others: Sequence[Search], count: int, best: int
) -> list[Retrieval]:
    """Return the queries of one search.

    ``others`` are searches of the same queries by other protocols: what is right only there is a semi-positive.
    """
    n = len(search.queries)
    shown = np.unique(np.linspace(0, n - 1, min(count, n)).astype(np.int64))
    to_tile = search.direction == TO_TILE
    asking, gallery = embeddings.query, embeddings.reference
    if not to_tile:
        asking, gallery = gallery, asking
    query = pick_rows(asking, search.queries[shown])
    truths = take(search.positives, shown)
    rows, which = np.unique(truths.indices, return_inverse=True)
    right = pick_rows(gallery, rows.astype(np.int64))[which]
    blocks = [(start, start + SHARD_ROWS) for start in range(0, search.gallery, SHARD_ROWS)]
    before = rank_positives(
        query, right, truths, take(search.ignored, shown), ((a, read_rows(gallery, a, b)) for a, b in blocks)
    ).wrong
    similarity = np.concatenate([query @ read_rows(gallery, a, b).T for a, b in blocks], axis=1)
    found = []
    for i, number in enumerate(shown.tolist()):
        own = truths.row(i)
        near = np.concatenate([search.ignored.row(number), *(other.positives.row(number) for other in others)])
        is_own = np.isin(np.arange(search.gallery), own)
        order = np.lexsort((is_own, -similarity[i]))[:best]
        try:
            [asked] = _pictures(layout, embeddings, search.queries[[number]], tiles=not to_tile)
            candidates = _pictures(layout, embeddings, order, tiles=to_tile)
        except (OSError, SyntaxError, ValueError):  # raised by Pillow for damaged images
            continue
        found.append(
            Retrieval(
                direction=search.direction,
                query=asked,
                candidates=candidates,
                similarities=[float(s) for s in similarity[i, order]],
                kinds=["positive" if is_own[row] else "semi-positive" if row in near else "negative" for row in order],
                rank=int(before[truths.indptr[i] : truths.indptr[i + 1]].min()) + 1,
            )
        )
    return found


def _pictures(layout: Layout, embeddings: Embeddings, rows: Int64, *, tiles: bool) -> list[bytes]:
    """Return pictures of the embedded tiles, or views, in these rows."""
    if tiles:
        return [thumbnail(read_image(layout, place)) for place in embeddings.reference_place[rows].tolist()]
    pairs = zip(embeddings.pairs.place[rows].tolist(), embeddings.pairs.view[rows].tolist(), strict=True)
    return [thumbnail(read_image(layout, place, view)) for place, view in pairs]


def thumbnail(data: bytes, pixels: int = THUMBNAIL) -> bytes:
    """Return an image as a small JPEG.

    Args:
        data: The image, in a format that Pillow knows.
        pixels: Most pixels a side.
    """
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if max(image.size) > pixels:
        image.thumbnail((pixels, pixels))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
