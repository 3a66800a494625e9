"""Build the geographic neighbour graph: the K nearest by great circle (latitude and longitude) or plane (UTM).

Each area has a search tree of its own; places of two areas are never neighbours. The matrix of all distances is never
made. The time grows with N log N where few places share a point. Where thousands do, each of them is compared with all
the others, because equal distances are ordered by key.
"""

from __future__ import annotations

import numpy as np

from geostream.arrays import Csr, Float64, Int32, Int64, listed, restrict
from geostream.errors import BadInput
from geostream.layout import Layout
from geostream.mining.graph import SHARD_ROWS, GraphWriter, NeighbourGraph, open_graph
from geostream.store import Store

EARTH_RADIUS = 6_371_008.8  # metres, mean
TREE_BLOCK = 4_000_000  # distances held at once


def points_in_metres(position: Float64, coordinates: str) -> Float64:
    """Turn positions into points whose straight distance is the distance of the places in metres.

    On the sphere this is the chord. It orders places as the arc does, and up to 9 km it is less than 1 mm shorter.

    Args:
        position: (N, 2) latitude and longitude in degrees, or UTM in metres.
        coordinates: "utm"; any other value means degrees.

    Returns:
        (N, 2) for UTM, (N, 3) on the sphere otherwise.
    """
    if coordinates == "utm":
        return position
    north, east = np.radians(position).T
    return EARTH_RADIUS * np.stack([np.cos(north) * np.cos(east), np.cos(north) * np.sin(east), np.sin(north)], axis=1)


def build_gps_graph(run: Store, name: str, layout: Layout, k: int) -> NeighbourGraph:
    """Build the graph of the training places' K nearest, and write it to the run.

    Args:
        run: The run's folder.
        name: Path of the graph within the run; a graph that is there is replaced.
        layout: The layout whose training places are compared.
        k: Neighbours of each place.

    Raises:
        BadInput: The layout or a training place has no coordinates.
    """
    if layout.coordinates == "none":
        raise BadInput(f"layout {layout.name} has no coordinates, so no GPS neighbours; begin with strategy=random")
    places = np.unique(layout.pairs("train").place)
    if not np.isfinite(layout.position[places]).all():
        unknown = layout.keys[int(places[~np.isfinite(layout.position[places]).all(axis=1)][0])]
        raise BadInput(f"layout {layout.name}: place {unknown} has no coordinates; begin with strategy=random")
    points = points_in_metres(layout.position[places], layout.coordinates)
    rank = np.empty(len(places), dtype=np.int64)
    rank[np.argsort(np.array(layout.keys)[places])] = np.arange(len(places))  # ids need not follow the keys
    rows, metres = nearest(points, layout.area[places], k, restrict(layout.excluded("train"), places), rank)
    writer = GraphWriter.create(run, name, kind="gps", layout=layout, embeddings="", places=places, k=k)
    indices = np.where(rows >= 0, places[rows], -1).astype(np.int32)
    for start in range(0, len(places), SHARD_ROWS):
        writer.write(start, indices[start : start + SHARD_ROWS], -metres[start : start + SHARD_ROWS])
    writer.commit({"mode": "exact"})
    return open_graph(run, name, layout)


def nearest(points: Float64, area: Int32, k: int, excluded: Csr, rank: Int64) -> tuple[Int32, Float64]:
    """Find the nearest other places within the same area.

    Distances are rounded to millimetres, and equal ones are ordered by rank. So the order on a regular grid does not
    depend on rounding errors.

    Args:
        points: (N, 2 or 3) points in metres.
        area: (N,) number of each place's area.
        k: How many to find.
        excluded: N lists of rows that are no neighbours.
        rank: (N,) rank of each place among places at the same distance.

    Returns:
        (N, k) rows and (N, k) distances in metres; -1 and inf where there are no more.
    """
    from sklearn.neighbors import KDTree  # here, because with SciPy it takes 0.1 GB that a visual search does not need

    indices = np.full((len(points), k), -1, dtype=np.int32)
    metres = np.full((len(points), k), np.inf)
    enough = k + 1 + int(np.diff(excluded.indptr).max(initial=0))
    for number in np.unique(area):
        rows = np.flatnonzero(area == number).astype(np.int32)
        tree = KDTree(points[rows])
        todo, wanted = rows, enough + 8  # a few more, because a tie at the end needs another query
        while len(todo):
            wanted = min(wanted, len(rows))
            again = []
            for block in np.array_split(todo, -(-len(todo) * wanted // TREE_BLOCK)):
                distance, found = tree.query(points[block], wanted)
                distance, found = np.round(distance, 3), rows[found]
                seen_to = distance[:, -1].copy()
                own = block[:, None]
                distance[(found == own) | listed(excluded, own, found)] = np.inf
                order = np.lexsort((rank[found], distance), axis=1)[:, :k]
                distance, found = (np.take_along_axis(a, order, axis=1) for a in (distance, found))
                indices[block, : order.shape[1]] = np.where(np.isfinite(distance), found, -1)
                metres[block, : order.shape[1]] = distance
                if wanted < len(rows):
                    again.append(block[distance[:, -1] >= seen_to])
            todo, wanted = np.concatenate([np.zeros(0, dtype=np.int32), *again]), 2 * wanted
    return indices, metres
