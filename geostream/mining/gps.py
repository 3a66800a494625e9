"""Build the geographic neighbour graph: the K nearest by great circle (latitude and longitude) or plane (UTM).

1. The client cuts the training places into blocks of space (:mod:`geostream.mining.place_blocks`), and writes what the
   search needs of each as one object.
2. One task for each block finds the neighbours of its places, exactly, and writes its finds as one object, sorted by
   row. Places of two areas are never neighbours.
3. One task for each range of whole Zarr shards of the graph collects the finds and writes the shards: the graph's rows
   are in the order of place ids, which need not follow space.

Workers need only the store, and a task that runs twice writes the same objects again. Of a layout that joins several
data sets, each is searched by its own coordinates. Places of a data set without coordinates have no neighbours.

What is held, in bytes, whatever N is: a thread at most 40 × BLOCK × K and 40 MB (at K = 64: 120 MB), or 18 × WRITTEN ×
K while it collects (75 MB). What grows with N: a worker holds 100 bytes a block. The client holds at most 80 bytes for
each of the N places, or 13 and three times its key, while these are sorted; and 8 for each semi-positive. Nothing grows
with N × K.

The time grows with N, except for two small parts: the client sorts keys and cuts blocks with N log N, and step 3 reads
up to (N / BLOCK) × (N / WRITTEN) ranges where ids do not follow space.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from geostream.arrays import Csr, Float64, Int32, distinct, take
from geostream.dask import connected, give_back, results, submit
from geostream.errors import BadInput, NotFound
from geostream.layout import Layout
from geostream.layout.zarr_groups import claim_scratch, drop_scratch, scratch_object
from geostream.mining.exact import GROUPS, row_groups
from geostream.mining.graph import GraphWriter, NeighbourGraph, as_scores, open_graph
from geostream.mining.place_blocks import BOX, PLACE, Places, box_of, cut, nearest_of_block
from geostream.progress import track
from geostream.store import Store

EARTH_RADIUS = 6_371_008.8  # metres, mean
BLOCK, LEAST = 32_768, 1024  # places of a block: at most, and where there would be fewer than GROUPS blocks
WRITTEN = 65_536  # rows that a task collects; with few, each would read a little from very many objects
SLICE = 2**18  # places that the client computes with at a time
READS = 8  # that a task makes at a time


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
        NotFound: Another process makes the graph again.
        GeostreamError: The scheduler cannot be reached, or workers die again and again.
    """
    if not has_positions(layout):
        raise BadInput(f"layout {layout.name} has no coordinates, so no GPS neighbours; begin with strategy=random")
    places = distinct(layout.pairs("train").place)
    blocks = _blocks(layout, places)
    writer = GraphWriter.create(run, name, kind="gps", layout=layout, embeddings="", places=places, k=k)
    job = GpsJob(run, name, k)
    _hand_over(job, layout, places, blocks)
    groups = row_groups(len(places), len(places), WRITTEN)
    with connected(cluster, max(len(blocks), len(groups))) as client:
        finds = [submit(client, f"gps-block-{number}", find_block, job, number) for number in range(len(blocks))]
        for _ in track(results(finds), "GPS neighbours", len(finds)):
            pass
        writes = [
            submit(client, f"gps-rows-{number}", collect_rows, job, *rows, _spans(blocks, *rows))
            for number, rows in enumerate(groups)
        ]
        for _ in track(results(writes), "neighbour graph", len(writes)):
            pass
    drop_scratch(run, name)
    writer.commit({"mode": "exact"})
    return open_graph(run, name, layout)


@dataclass(frozen=True)
class GpsJob:
    """The facts that every task needs."""

    run: Store
    graph: str  # path of the graph being written
    k: int

    @property
    def find(self) -> np.dtype[np.void]:
        """What a task finds for a row of the graph."""
        return np.dtype([("row", "<i4"), ("other", "<i4", (self.k,)), ("score", "<f2", (self.k,))])

    def path(self, kind: str, number: int = 0) -> str:
        """Return the path of a scratch object."""
        return scratch_object(self.graph, kind, number)


def _blocks(layout: Layout, places: Int32) -> list[Int32]:
    """Cut the training places into blocks; return the rows of each. Places without a position are in none."""
    points = np.empty((3, len(places)), dtype=np.float32)
    for start in range(0, len(places), SLICE):
        points[:, start : start + SLICE] = place_points(layout, places[start : start + SLICE]).T
    unknown = np.flatnonzero(~np.isfinite(points).all(axis=0))
    without = np.array([one.coordinates == "none" for one in layout.joined] or [False])
    if len(unknown := unknown[~without[layout.part[places[unknown]]]]):
        key = layout.key(int(places[unknown[0]]))
        raise BadInput(f"layout {layout.name}: place {key} has no coordinates; begin with strategy=random")
    return cut(points, layout.area[places], min(BLOCK, max(LEAST, -(-len(places) // GROUPS))))


def _hand_over(job: GpsJob, layout: Layout, places: Int32, blocks: list[Int32]) -> None:
    """Write what the workers need of the layout: an object for each block, and one with the boxes of all."""
    claim_scratch(job.run, job.graph, places=len(blocks), finds=len(blocks), boxes=1)
    _free()
    rank, boxes = _ranks(layout, places), np.empty(len(blocks), dtype=BOX)
    _free()
    listed = _semi_positives(layout, places)
    _free()
    for number, rows in enumerate(blocks):
        facts, lists = np.empty(len(rows), dtype=PLACE), take(listed, rows)
        facts["row"], facts["place"], facts["rank"] = rows, places[rows], rank[rows]
        facts["point"], facts["area"] = place_points(layout, places[rows]), layout.area[places[rows]]
        facts["n"] = np.diff(lists.indptr)
        job.run.write(job.path("places", number), Places(facts, lists).to_bytes())
        boxes[number] = box_of(facts)
    job.run.write(job.path("boxes"), boxes.tobytes())


def _free() -> None:
    """Give back what reading the index has left behind; Arrow would keep it for itself."""
    pa.default_memory_pool().release_unused()
    give_back()


def _ranks(layout: Layout, places: Int32) -> Int32:
    """Return the rank of each place by its key: ids need not follow the keys."""
    keys = layout.index.read("places.parquet", ["key"])["key"]
    if len(places) < len(keys):
        keys = keys.take(places)
    rank = np.empty(len(places), dtype=np.int32)
    rank[pc.sort_indices(keys).to_numpy()] = np.arange(len(places), dtype=np.int32)
    return rank


def _semi_positives(layout: Layout, places: Int32) -> Csr:
    """Return the semi-positives of each place: those of all its training views, one after the other."""
    lists, place = layout.semi_positives("train"), layout.pairs("train").place
    indptr = np.full(len(places) + 1, lists.indptr[-1])
    for start in range(0, len(places), SLICE):
        some = places[start : start + SLICE]
        indptr[start : start + len(some)] = lists.indptr[np.searchsorted(place, some)]
    return Csr(indptr, lists.indices)


def _spans(blocks: list[Int32], start: int, stop: int) -> Int32:
    """Return which finds are of the rows from ``start`` to ``stop``: (n, 3) block, first find, and the one behind."""
    ends = [(number, *np.searchsorted(rows, [start, stop])) for number, rows in enumerate(blocks)]
    return np.array([span for span in ends if span[1] < span[2]], dtype=np.int32).reshape(-1, 3)


def find_block(job: GpsJob, number: int) -> None:
    """Run as a task: find the neighbours of a block's places, and write them as one object, sorted by row."""
    give_back()
    boxes = np.frombuffer(job.run.read(job.path("boxes")), dtype=BOX)

    def read(block: int) -> Places:
        return Places.from_bytes(job.run.read(job.path("places", block)), int(boxes["places"][block]))

    found, finds = nearest_of_block(number, boxes, read, job.k), np.empty(boxes["places"][number], dtype=job.find)
    finds["row"], finds["other"], finds["score"] = read(number).facts["row"], found.place, as_scores(-found.metres())
    job.run.write(job.path("finds", number), finds.tobytes())


def collect_rows(job: GpsJob, start: int, stop: int, spans: Int32) -> None:
    """Run as a task: collect the finds of some rows of the graph, and write its Zarr shards.

    Args:
        job: The search.
        start: First row, at the beginning of a Zarr shard.
        stop: Row behind the last.
        spans: Where the finds are: (n, 3) number of the block, first find, and the one behind the last.

    Raises:
        NotFound: Another process makes the graph again.
    """
    give_back()
    others = np.full((stop - start, job.k), -1, dtype=np.int32)
    scores = np.full((stop - start, job.k), -np.inf, dtype=np.float16)
    seen = np.zeros(stop - start, dtype=bool)

    def read(span: list[int]) -> npt.NDArray[np.void]:
        number, first, last = span
        size = job.find.itemsize
        return np.frombuffer(
            job.run.read_range(job.path("finds", number), size * first, size * (last - first)), job.find
        )

    with ThreadPoolExecutor(READS) as threads:
        for finds in threads.map(read, spans.tolist()):
            rows = finds["row"].astype(np.int64) - start
            if rows.min() < 0 or rows.max() >= len(seen) or seen[rows].any():
                raise NotFound(f"{job.run.url}/{job.graph}: another process makes it again; wait for it")
            others[rows], scores[rows], seen[rows] = finds["other"], finds["score"], True
    GraphWriter.reopen(job.run, job.graph).write(start, others, scores)
