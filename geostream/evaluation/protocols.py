"""Say for each protocol which candidates are a query's positives.

The rules of four datasets become one form: for each query a list of gallery rows. With "paired" the only positive is
the tile of the query's own place. With "within-5m" every tile within 5 metres of the query is one, too. With
"both-ways" views look for their tile, and tiles for all their views, with distractors' views among the candidates.

Sources: VIGOR (Zhu et al., CVPR 2021, section 5) for the semi-positives; ``RecallGeo.m`` of CVACT's authors (Liu and
Li, CVPR 2019) for the 5 metres, the limit included; University-1652 (Zheng et al., ACM MM 2020) for both ways.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from geostream.arrays import Csr, Float64, Int32, Int64, Pairs, distinct, pair_codes
from geostream.errors import BadInput, StaleArtefact
from geostream.layout import Layout
from geostream.layout.layout import PLACES_FILE
from geostream.mining.gps import points_in_metres

PAIRED, NEAR, BOTH_WAYS = "paired", "within-5m", "both-ways"
TO_TILE, TO_VIEW = "view→tile", "tile→view"
METRES = 5.0
ASKED = 2**14  # views whose near tiles are looked up at once: a Python object each


@dataclass(frozen=True)
class Search:
    """Hold the queries of one side, with their positives on the other.

    Attributes:
        direction: TO_TILE: queries are views, the gallery tiles; TO_VIEW: the other way round.
        queries: (n,) rows of the embedded queries, sorted.
        positives: n lists of gallery rows, none empty.
        ignored: n lists of gallery rows that the hit rate ignores (semi-positives).
        gallery: Number of candidates.
    """

    direction: str
    queries: Int64
    positives: Csr
    ignored: Csr
    gallery: int


def split_pairs(layout: Layout, split: str) -> Pairs:
    """Return the views to embed for a split, sorted by place and view.

    These are its pairs; for the test split also the views that are only candidates.
    """
    pairs = layout.pairs(split)
    if split == "test" and len(extra := layout.pairs("gallery")):
        both = Pairs(np.append(pairs.place, extra.place), np.append(pairs.view, extra.view))
        order = np.argsort(pair_codes(*both))
        pairs = Pairs(both.place[order], both.view[order])
    return pairs


def searches(layout: Layout, split: str, pairs: Pairs, reference_place: Int32) -> list[tuple[str, Search]]:
    """Return (protocol, search) of each row of the split's results, the headline first.

    Args:
        layout: Its protocols decide which rows there are.
        split: "train" or "test".
        pairs: The embedded views, row by row.
        reference_place: (R,) place ids of the embedded tiles, row by row.

    Raises:
        StaleArtefact: The embedded views are not those of the split.
        BadInput: The layout joins others, there are no queries, a query's own tile is not in the gallery, or a protocol
            needs coordinates that the layout does not have.
    """
    if layout.joined:
        each = ", ".join(one.dataset for one in layout.joined)
        raise BadInput(f"layout {layout.name} of {layout.dataset} joins {each}: each has a test gallery of its own")
    embedded, wanted = pair_codes(*pairs), pair_codes(*split_pairs(layout, split))
    if not np.array_equal(embedded, wanted):
        raise StaleArtefact(f"the embeddings' queries are not the {split} pairs of layout {layout.name}; embed again")
    own = layout.pairs(split)
    if not len(own) or not len(reference_place):
        raise BadInput(f"layout {layout.name}: nothing to evaluate, split {split} has no pairs or no gallery")
    queries = np.searchsorted(embedded, pair_codes(*own))
    row = np.full(layout.n_places, -1, dtype=np.int64)
    row[reference_place] = np.arange(len(reference_place))
    tile = row[own.place]
    if (tile < 0).any():
        key = layout.places["key"][int(own.place[tile < 0][0])].as_py()
        raise BadInput(f"layout {layout.name}: the true tile of {key} is not in the gallery of split {split}")
    ignored = _gallery_rows(layout.semi_positives(split), row)
    paired = Search(TO_TILE, queries, _one_each(tile), ignored, len(reference_place))
    found: list[tuple[str, Search]] = []
    for protocol in layout.protocols:
        if protocol == NEAR:
            positives = _with_near(tile, *_points(layout, split, reference_place))
            found.append((NEAR, Search(TO_TILE, queries, positives, ignored, len(reference_place))))
        else:
            found.append((protocol, paired))
        if protocol == BOTH_WAYS:
            found.append((BOTH_WAYS, _to_views(own, pairs, row)))
    return found


def _to_views(own: Pairs, pairs: Pairs, row: Int64) -> Search:
    """Return the search of each place that a query shows for all its embedded views."""
    places = distinct(own.place)
    first, last = np.searchsorted(pairs.place, places), np.searchsorted(pairs.place, places, side="right")
    indptr = np.concatenate([[0], np.cumsum(last - first)])
    views = np.arange(indptr[-1]) + np.repeat(first - indptr[:-1], last - first)
    return Search(TO_VIEW, row[places], Csr(indptr, views.astype(np.int32)), _none(len(places)), len(pairs))


def view_positions(layout: Layout, split: str) -> Float64:
    """Return (P, 2) north and east of where each query of a split was taken; NaN where unknown.

    Args:
        layout: The layout.
        split: "train" or "test"; rows are those of ``layout.pairs(split)``.
    """
    columns = [f"views.list.element.{name}" for name in ("split", "north", "east")]
    parts = [np.zeros((0, 2))]
    for table in layout.index.parts(PLACES_FILE, columns):
        views = table["views"].combine_chunks().flatten()
        views = views.filter(pc.equal(views.field("split"), pa.scalar(split)))
        parts.append(np.stack([views.field(axis).to_numpy(zero_copy_only=False) for axis in ("north", "east")], axis=1))
    return np.concatenate(parts)


def _points(layout: Layout, split: str, reference_place: Int32) -> tuple[Float64, Float64]:
    """Return the queries of a split and the tiles of its gallery as points in metres; NaN for unknown ones."""
    if layout.coordinates == "none":
        raise BadInput(f"layout {layout.name}: protocol {NEAR} needs coordinates, and the layout has none")
    at = view_positions(layout, split), layout.position[reference_place]
    return tuple(points_in_metres(p, layout.coordinates) for p in at)  # type: ignore[return-value]


def _with_near(tile: Int64, view_point: Float64, tile_point: Float64) -> Csr:
    """Return the own tile of each query and all tiles within 5 metres of it, the limit included."""
    from sklearn.neighbors import KDTree  # a tenth of a gigabyte with SciPy, which no other protocol should hold

    known, placed = (np.flatnonzero(np.isfinite(points).all(axis=1)) for points in (view_point, tile_point))
    if not len(known) or not len(placed):
        return _one_each(tile)
    tree = KDTree(tile_point[placed])
    codes = [np.arange(len(tile)) << 32 | tile]  # view and tile as one number
    for start in range(0, len(known), ASKED):
        views = known[start : start + ASKED]
        found = tree.query_radius(view_point[views], METRES * 1.001)
        view, near = np.repeat(views, [len(some) for some in found]), placed[np.concatenate(found)]
        step = view_point[view] - tile_point[near]
        inside = np.sqrt((step**2).sum(axis=1)) <= METRES  # the tree's rounding must not decide at the limit
        codes.append(view[inside] << 32 | near[inside])
    both = distinct(np.concatenate(codes))
    counts = np.bincount(both >> 32, minlength=len(tile))
    return Csr(np.concatenate([[0], np.cumsum(counts)]), (both & 0xFFFFFFFF).astype(np.int32))


def _one_each(tile: Int64) -> Csr:
    return Csr(np.arange(len(tile) + 1), tile.astype(np.int32))


def _none(n: int) -> Csr:
    return Csr(np.zeros(n + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))


def _gallery_rows(places: Csr, row: Int64) -> Csr:
    """Return the ragged place ids as gallery rows, without places outside of the gallery."""
    rows = row[places.indices]
    kept_before = np.concatenate([[0], np.cumsum(rows >= 0)])
    return Csr(kept_before[places.indptr].astype(np.int64), rows[rows >= 0].astype(np.int32))
