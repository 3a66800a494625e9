"""What a model retrieves, as pictures: queries beside their best candidates, the right ones framed.

Decides which queries are shown: a dozen of each direction, spread evenly over the split, so that successes and failures
appear in their own proportion. Each costs one read a picture; the gallery is read once, block by block.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from geostream.arrays import Int64, take
from geostream.evaluation.protocols import TO_TILE, Search, searches
from geostream.evaluation.ranks import rank_positives
from geostream.layout import Layout
from geostream.mining.embeddings import SHARD_ROWS, Embeddings, pick_rows, read_rows

THUMBNAIL = 192  # pixels of a picture's longer side

#: What a page that shows a :func:`retrieval_section` needs in its style sheet.
STYLE = """
.row { display: flex; gap: 10px; align-items: flex-start; margin-bottom: 14px }
figure { margin: 0; text-align: center } figcaption { font-size: 12px; color: #666 }
figure img { height: 96px; border: 4px solid transparent; image-rendering: auto }
figure.query { width: 410px } figure.query img { max-width: 400px; width: auto }
figure.truth img, span.truth { border-color: #2f8f5b } figure.semi img { border-color: #d69a1e }
span.truth { color: #2f8f5b } span.semi { color: #b07a10 }
"""

_INTRODUCTIONS = {
    TO_TILE: "Test queries of unseen places, and their five best tiles of the whole gallery. "
    "<span class=truth>Green: the true tile.</span> <span class=semi>Amber: another tile that shows the spot, a "
    "semi-positive or one within 5 metres.</span>",
}
_INTRODUCTION = (
    "The other way round: tiles of the test places, and their five best views of all those in the gallery. "
    "<span class=truth>Green: a view of the same place.</span>"
)


@dataclass(frozen=True)
class Retrieval:
    """One query with its best candidates: pictures as JPEG bytes."""

    direction: str  # "view→tile" or "tile→view"
    query: bytes
    candidates: list[bytes]
    similarities: list[float]
    kinds: list[str]  # "truth", "semi" or "wrong", a candidate each
    rank: int  # of the best right candidate, 1 = best; ties count against the model


def retrievals(layout: Layout, embeddings: Embeddings, *, count: int = 12, best: int = 5) -> list[Retrieval]:
    """``count`` queries of each direction, spread evenly over the embedded split, with their ``best`` candidates."""
    told = searches(layout, embeddings.split, embeddings.pairs, embeddings.reference_place)
    found: list[Retrieval] = []
    for direction in dict.fromkeys(search.direction for _, search in told):
        first, *others = (search for _, search in told if search.direction == direction)
        found += _of_search(layout, embeddings, first, others, count, best)
    return found


def _of_search(
    layout: Layout, embeddings: Embeddings, search: Search, others: Sequence[Search], count: int, best: int
) -> list[Retrieval]:
    """``others``: searches of the same queries by other rules; what is right by these, only, is "semi"."""
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
        except (OSError, SyntaxError, ValueError):  # what Pillow says to damaged images: the others are shown
            continue
        found.append(
            Retrieval(
                direction=search.direction,
                query=asked,
                candidates=candidates,
                similarities=[float(s) for s in similarity[i, order]],
                kinds=["truth" if is_own[row] else "semi" if row in near else "wrong" for row in order],
                rank=int(before[truths.indptr[i] : truths.indptr[i + 1]].min()) + 1,
            )
        )
    return found


def retrieval_section(pictures: Sequence[Retrieval]) -> str:
    """The pictures as a section of an HTML page whose style sheet holds STYLE."""
    parts = ["<h2>What it retrieves</h2>"]
    for direction in dict.fromkeys(one.direction for one in pictures):
        rows = "".join(_retrieval(one) for one in pictures if one.direction == direction)
        parts.append(f"<p>{_INTRODUCTIONS.get(direction, _INTRODUCTION)}</p><div class=grid>{rows}</div>")
    return "".join(parts)


def _retrieval(one: Retrieval) -> str:
    candidates = "".join(
        f"<figure class={kind}><img src='{_data(candidate)}'><figcaption>{similarity:.2f}</figcaption></figure>"
        for candidate, kind, similarity in zip(one.candidates, one.kinds, one.similarities, strict=True)
    )
    what = "true tile" if one.direction == TO_TILE else "best true view"
    query = f"<img src='{_data(one.query)}'><figcaption>{what}: rank {one.rank}</figcaption>"
    return f"<div class=row><figure class=query>{query}</figure>{candidates}</div>"


def _data(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def _pictures(layout: Layout, embeddings: Embeddings, rows: Int64, *, tiles: bool) -> list[bytes]:
    """Of the embedded tiles, or views, in these rows."""
    if tiles:
        members = layout.member_rows(embeddings.reference_place[rows])
    else:
        members = layout.member_rows(embeddings.pairs.place[rows], embeddings.pairs.view[rows])
    return [_thumbnail(layout, int(row)) for row in members]


def _thumbnail(layout: Layout, row: int) -> bytes:
    member = layout.members.slice(row, 1).to_pylist()[0]
    data = layout.store.read_range(layout.shard_names[member["shard"]], member["offset"], member["size"])
    image = Image.open(io.BytesIO(data)).convert("RGB")
    if max(image.size) > THUMBNAIL:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
