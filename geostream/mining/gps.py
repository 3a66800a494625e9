"""Build the geographic neighbour graph: the K nearest by great circle (latitude and longitude) or plane (UTM).

Each Dask task finds the neighbours of one range of the graph's rows, and writes whole Zarr shards. All tasks of a
process share one search tree over all training places. Places of two areas are never neighbours: the number of the area
is one more coordinate, so areas lie farther apart than a search looks. The tree is built from objects that the client
writes to the store, so a worker needs neither the layout nor another worker.

Of a layout that joins several data sets, each is searched by its own coordinates. Places of a data set without
coordinates have no neighbours.

A process holds at most 130 bytes for each of the N training places while it builds the tree, and 70 afterwards (0.7 GB
for ten million). A task holds about 80 bytes for each of DISTANCES distances (80 MB). The client holds about 40 bytes
a place, beside the layout and its lists of excluded places. Nothing grows with N × K.

The time grows with N log N where few places share a point. Where thousands do, each of them is compared with all the
others, because equal distances are ordered by key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from geostream.arrays import Csr, Float64, Int32, Int64, distinct, listed, take
from geostream.dask import connected, everywhere, results, submit
from geostream.errors import BadInput
from geostream.layout import Layout
from geostream.layout.zarr_groups import claim_scratch, drop_scratch, scratch_object
from geostream.mining.exact import QUERIES, row_groups
from geostream.mining.graph import GraphWriter, NeighbourGraph, open_graph
from geostream.progress import track
from geostream.store import Store

EARTH_RADIUS = 6_371_008.8  # metres, mean
DISTANCES = 1_000_000  # distances that a task holds at once
#: A training place, as the client hands it to the workers.
PLACE = np.dtype([("point", "<f8", 3), ("place", "<i4"), ("area", "<i4"), ("rank", "<i4")])


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


def place_points(layout: Layout, places: Int32) -> Float64:
    """Return the points of some places, in which the distance of two places of one data set is theirs in metres.

    Args:
        layout: The layout; where it joins several data sets, distances between two of these mean nothing.
        places: (n,) place ids.

    Returns:
        (n, 3) points; NaN for places whose position is unknown. The third number is 0 for UTM.
    """
    points = np.full((len(places), 3), np.nan)
    part = layout.part[places]
    for number, kind in enumerate([one.coordinates for one in layout.joined] or [layout.coordinates]):
        here = np.flatnonzero(part == number)
        if kind != "none":
            found = points_in_metres(layout.position[places[here]], kind)
            points[here] = np.pad(found, ((0, 0), (0, 3 - found.shape[1])))
    return points


def has_positions(layout: Layout) -> bool:
    """Return whether the layout, or one of those that it joins, has coordinates."""
    return any(kind != "none" for kind in [one.coordinates for one in layout.joined] or [layout.coordinates])


def build_gps_graph(run: Store, name: str, layout: Layout, k: int, cluster: str | None = None) -> NeighbourGraph:
    """Build the graph of the training places' K nearest, and write it to the run.

    Args:
        run: The run's folder.
        name: Path of the graph within the run; a graph that is there is replaced.
        layout: The layout whose training places are compared.
        k: Neighbours of each place.
        cluster: URL of a Dask scheduler whose workers reach the store; None starts one within this process.

    Raises:
        BadInput: The layout or a training place has no coordinates.
        GeostreamError: The scheduler cannot be reached, or workers die again and again.
    """
    if not has_positions(layout):
        raise BadInput(f"layout {layout.name} has no coordinates, so no GPS neighbours; begin with strategy=random")
    places = distinct(layout.pairs("train").place)
    known = np.isfinite(place_points(layout, places)).all(axis=1)
    without = np.array([one.coordinates == "none" for one in layout.joined] or [False])
    if not (known | without[layout.part[places]]).all():
        unknown = places[~known & ~without[layout.part[places]]][0]
        key = layout.key(int(unknown))
        raise BadInput(f"layout {layout.name}: place {key} has no coordinates; begin with strategy=random")
    writer = GraphWriter.create(run, name, kind="gps", layout=layout, embeddings="", places=places, k=k)
    groups = row_groups(len(places), len(places), QUERIES)
    job = GpsJob(run, name, k, len(places), len(groups))
    _hand_over(job, layout, places, groups)
    with connected(cluster, len(groups)) as client:
        try:
            tasks = [
                submit(client, f"gps-rows-{number}", nearest_of_group, job, number, start)
                for number, (start, _) in enumerate(groups)
            ]
            for _ in track(results(tasks), "GPS neighbours", len(tasks)):
                pass
        finally:
            everywhere(client, forget)
    drop_scratch(run, name)
    writer.commit({"mode": "exact"})
    return open_graph(run, name, layout)


@dataclass(frozen=True)
class GpsJob:
    """The facts that every task needs."""

    run: Store
    graph: str  # path of the graph being written
    k: int
    n_places: int
    n_groups: int  # groups of the graph's rows; each is a task
    token: str = field(default_factory=lambda: uuid4().hex)  # tells searches apart

    def read_places(self, number: int) -> npt.NDArray[np.void]:
        """Read the places of a group, (n,) of :data:`PLACE`."""
        return np.frombuffer(self.run.read(scratch_object(self.graph, "places", number)), dtype=PLACE)

    def read_excluded(self, number: int, n: int) -> Csr:
        """Read the places that are no neighbours of the n places of a group: a list of place ids for each."""
        numbers = np.frombuffer(self.run.read(scratch_object(self.graph, "excluded", number)), dtype="<i4")
        lengths, indices = np.split(numbers, [n])
        return Csr(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), indices)


def _hand_over(job: GpsJob, layout: Layout, places: Int32, groups: list[tuple[int, int]]) -> None:
    """Write what the workers need of the layout, as two objects for each group of rows."""
    claim_scratch(job.run, job.graph, places=len(groups), excluded=len(groups))
    rank = np.empty(len(places), dtype=np.int32)  # ids need not follow the keys
    keys = layout.index.read("places.parquet", ["key"])["key"]
    rank[pc.sort_indices(keys.take(places)).to_numpy()] = np.arange(len(places), dtype=np.int32)
    excluded = layout.excluded("train")
    for number, (start, stop) in enumerate(groups):
        here = places[start:stop]
        table = np.empty(stop - start, dtype=PLACE)
        table["point"], table["area"] = place_points(layout, here), layout.area[here]
        table["place"], table["rank"] = here, rank[start:stop]
        job.run.write(scratch_object(job.graph, "places", number), table.tobytes())
        lists = take(excluded, here)
        numbers = np.concatenate([np.diff(lists.indptr).astype("<i4"), lists.indices.astype("<i4")])
        job.run.write(scratch_object(job.graph, "excluded", number), numbers.tobytes())


def nearest_of_group(job: GpsJob, number: int, start: int) -> None:
    """Run as a task: find the neighbours of the group of rows that begins with ``start``, and write its Zarr shards."""
    tree, places = _tree_of(job), job.read_places(number)
    excluded = job.read_excluded(number, len(places))
    found, metres = tree.nearest(places["point"], places["area"], places["place"], excluded, job.k)
    GraphWriter.reopen(job.run, job.graph).write(start, found, -metres)


_building = Lock()


def _tree_of(job: GpsJob) -> PlaceTree:
    """Return this process's tree; the first thread that calls this builds it."""
    with _building:
        return _build(job)


@lru_cache(maxsize=1)
def _build(job: GpsJob) -> PlaceTree:
    points = np.empty((job.n_places, 3))
    place, area, rank = (np.empty(job.n_places, dtype=np.int32) for _ in range(3))
    start = 0
    for number in range(job.n_groups):
        part = job.read_places(number)
        here = slice(start, start := start + len(part))
        points[here] = part["point"]
        place[here], area[here], rank[here] = part["place"], part["area"], part["rank"]
    known = np.isfinite(points).all(axis=1)
    if not known.all():
        points, area, place, rank = points[known], area[known], place[known], rank[known]
    return PlaceTree(points, area, place, rank)


def forget() -> None:
    """Free the tree that a search has left in this process."""
    _build.cache_clear()


class PlaceTree:
    """Find the nearest places within the same area.

    Distances are rounded to millimetres, and equal ones are ordered by rank. So the order on a regular grid does not
    depend on rounding errors.

    Args:
        points: (N, 2 or 3) points in metres.
        area: (N,) number of each place's area.
        place: (N,) id of each place.
        rank: (N,) rank of each place among places at the same distance.
    """

    def __init__(self, points: Float64, area: Int32, place: Int32, rank: Int32) -> None:
        from scipy.spatial import cKDTree  # here, because it takes memory that a visual search does not need

        self._reach = 1 + float(np.linalg.norm(np.ptp(points, axis=0)))  # no two places of an area are as far apart
        spaced = self._spaced(points, area)
        # Places that are close in space are put close in memory. Where ids are in no such order, this halves the time.
        order = cKDTree(spaced, balanced_tree=False, copy_data=False).indices
        self._tree = cKDTree(spaced[order], balanced_tree=False, copy_data=False)
        self._place, self._rank = place[order], rank[order]

    def _spaced(self, points: Float64, area: Int32) -> Float64:
        """Return the points with one more coordinate, so that places of two areas are out of reach of each other."""
        return np.concatenate([points, 2 * self._reach * area[:, None]], axis=1)

    def nearest(self, points: Float64, area: Int32, own: Int32, excluded: Csr, k: int) -> tuple[Int32, Float64]:
        """Find the nearest other places of some places.

        Args:
            points: (n, 2 or 3) points in metres; one that is not finite has no neighbours.
            area: (n,) number of each place's area.
            own: (n,) id of each place, which is no neighbour.
            excluded: n lists of further ids that are no neighbours.
            k: How many to find.

        Returns:
            (n, k) ids and (n, k) distances in metres; -1 and inf where there are no more.
        """
        indices, metres = np.full((len(points), k), -1, dtype=np.int32), np.full((len(points), k), np.inf)
        points = self._spaced(points, area)
        todo = np.flatnonzero(np.isfinite(points).all(axis=1))
        wanted = k + 9 + int(np.diff(excluded.indptr).max(initial=0))  # 8 more: a tie at the end takes another query
        while len(todo):
            again = []
            for rows in _blocks(todo, wanted):
                distance, at = self._tree.query(points[rows], wanted, distance_upper_bound=self._reach)
                distance, at = np.round(distance, 3), np.minimum(at, len(self._place) - 1)
                seen_to, found = distance[:, -1].copy(), self._place[at]
                own_lists = take(excluded, rows)
                distance[(found == own[rows, None]) | listed(own_lists, np.arange(len(rows))[:, None], found)] = np.inf
                order = np.lexsort((self._rank[at], distance), axis=1)[:, :k]
                distance, found = (np.take_along_axis(a, order, axis=1) for a in (distance, found))
                indices[rows], metres[rows] = np.where(np.isfinite(distance), found, -1), distance
                again.append(rows[(distance[:, -1] >= seen_to) & np.isfinite(seen_to)])
            todo, wanted = np.concatenate(again), 2 * wanted
        return indices, metres


def _blocks(rows: Int64, wanted: int) -> Iterator[Int64]:
    """Cut rows into blocks of at most DISTANCES distances, or of one row."""
    size = max(1, DISTANCES // wanted)
    return (rows[start : start + size] for start in range(0, len(rows), size))
