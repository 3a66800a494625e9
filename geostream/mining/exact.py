"""Search neighbours exactly: each Dask task compares a block of queries with a block of references.

A task reads at most QUERIES queries and BLOCK references and finds the K most similar. A tree of tasks merges the finds
of all blocks of references. Only the last task of a tree writes the Zarr shards of the graph that belong to its
queries. Only (QUERIES, K) finds are sent between workers. A thread keeps its block of references until it needs
another, and threads of one process share blocks, so where there is a single block it is read once.

Tasks of later queries wait for those of earlier ones. So beside the blocks, the number of finds that a cluster holds is
about its number of threads plus the height of the tree, whatever N is. A thread holds BLOCK × D × 4 bytes of
references, QUERIES × D × 4 of queries and about 6 × QUERIES × K × 8 of finds: 220 MB at D = 1024, K = 128.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count, pairwise
from threading import Lock, get_ident
from typing import Any, ClassVar, TypeVar
from uuid import uuid4
from weakref import WeakValueDictionary

import numpy as np

from geostream.arrays import Bools, Csr, Float32, Int32, distinct, take
from geostream.dask import give_back, submit
from geostream.mining.embeddings import CHUNK_ROWS, Embeddings, open_embeddings, read_rows
from geostream.mining.false_negatives import depth, kept
from geostream.mining.graph import SHARD_ROWS, GraphWriter
from geostream.mining.topk import SLICE, References, TopK, by_place, merge, nearest_of
from geostream.store import Store

BLOCK = 32_768  # references of a block: 128 MiB at 1024 dimensions; small blocks cost time (docs/notes/mining.md)
QUERIES = 8_192  # queries of a block; their finds take memory, too
GROUPS = 8  # least number of row groups, if there are as many Zarr shards, so that all cores have work to the end

Item = TypeVar("Item")


@dataclass(frozen=True)
class SearchJob:
    """The facts that every task of a search needs."""

    run: Store
    embeddings: str  # path within the run
    graph: str  # path of the graph being written
    wanted: int  # neighbours of each place in the graph
    margin: float = 0.0  # of the own tile's similarity, above which candidates are dropped; 0: none is
    token: str = field(default_factory=lambda: uuid4().hex)  # tells searches apart

    @property
    def k(self) -> int:
        """Number of neighbours to search, K."""
        return depth(self.wanted, self.margin)

    def open(self) -> Embeddings:
        """Open the embeddings, once in a process."""
        return _opened(self)

    def writer(self) -> GraphWriter:
        """Return a writer of the graph that was begun."""
        return GraphWriter.reopen(self.run, self.graph)


@lru_cache(maxsize=1)
def _opened(job: SearchJob) -> Embeddings:
    """Open the embeddings once in a process: it costs 20 ms of Python, which other threads wait for."""
    return open_embeddings(job.run, job.embeddings, None)


@dataclass(frozen=True)
class PlaceRange:
    """A range of consecutive places, and their queries."""

    first: int  # first row of the queries
    last: int  # row behind their last
    places: Int32  # (n,) place ids
    excluded: Csr  # n lists of place ids that are no neighbours


def row_groups(n_places: int, n_queries: int, most: int) -> list[tuple[int, int]]:
    """Cut a graph's rows into ranges of whole Zarr shards, of similar size and with about ``most`` queries at most.

    Args:
        n_places: Rows of the graph.
        n_queries: Queries of all places.
        most: Queries of a range.

    Returns:
        The first row of each range, and the row behind its last.
    """
    shards = -(-n_places // SHARD_ROWS)
    ends = np.linspace(0, shards, min(shards, max(GROUPS, -(-n_queries // most))) + 1).astype(int) * SHARD_ROWS
    return [(int(start), int(min(end, n_places))) for start, end in pairwise(ends)]


def place_ranges(places: Int32, pair_place: Int32, most: int) -> list[tuple[Int32, int, int]]:
    """Cut places into ranges of at most ``most`` queries, or of one place.

    Args:
        places: (n,) place ids, sorted.
        pair_place: (P,) place id of every query, sorted.
        most: Most queries of a range.

    Returns:
        The place ids of each range, the first row of their queries, and the row behind the last.
    """
    row = np.append(np.searchsorted(pair_place, places), np.searchsorted(pair_place, places[-1] + 1))
    cut = [0]
    while cut[-1] < len(places):
        cut.append(max(cut[-1] + 1, int(np.searchsorted(row, row[cut[-1]] + most, side="right")) - 1))
    return [(places[a:b], int(row[a]), int(row[b])) for a, b in pairwise(cut)]


def reference_blocks(n: int) -> list[tuple[int, int]]:
    """Cut the references into blocks of similar size, at most BLOCK, that end where a chunk of the embeddings ends.

    Args:
        n: Number of references.

    Returns:
        The first row of each block, and the row behind its last.
    """
    ends = np.linspace(0, -(-n // CHUNK_ROWS), -(-n // BLOCK) + 1).astype(int) * CHUNK_ROWS
    return [(int(start), int(min(end, n))) for start, end in pairwise(ends)]


def has_query(embeddings: Embeddings, ids: Int32) -> Bools:
    """Return whether each of some place ids has a query."""
    place = embeddings.pairs.place  # sorted, so a block of ids costs the same whatever N is
    found: Bools = place[np.minimum(np.searchsorted(place, ids), len(place) - 1)] == ids
    return found


def read_references(embeddings: Embeddings, start: int, stop: int) -> tuple[Int32, Float32]:
    """Read a block of references, without tiles that have no query.

    Args:
        embeddings: The embeddings to read from.
        start: First row of the block.
        stop: Row behind its last.

    Returns:
        (n,) place ids and (n, D) vectors.
    """
    ids = embeddings.reference_place[start:stop]
    vectors = read_rows(embeddings.reference, start, stop)
    wanted = has_query(embeddings, ids)
    return (ids, vectors) if wanted.all() else (ids[wanted], vectors[wanted])


class SharedBlock:
    """A block of references that threads share. It is freed when every thread has gone on to another block."""

    _all: ClassVar[WeakValueDictionary[tuple[str, int, int], SharedBlock]] = WeakValueDictionary()
    _of_thread: ClassVar[dict[int, SharedBlock]] = {}
    _choosing = Lock()

    def __init__(self) -> None:
        self._reading = Lock()
        self._references: References | None = None

    @classmethod
    def of(cls, job: SearchJob, start: int, stop: int) -> SharedBlock:
        """Return this process's block of some references, and release the one that this thread used before.

        Args:
            job: The search.
            start: First row of the block.
            stop: Row behind its last.
        """
        with cls._choosing:
            held = cls._all.setdefault((job.token, start, stop), cls())
            cls._of_thread[get_ident()] = held
            return held

    @classmethod
    def release_all(cls) -> None:
        """Release the blocks and embeddings that searches have left in this process."""
        with cls._choosing:
            cls._of_thread.clear()
        _opened.cache_clear()

    def references(self, embeddings: Embeddings, start: int, stop: int) -> References:
        """Return the references; the first thread that calls this reads them.

        Args:
            embeddings: The embeddings to read from.
            start: First row of the block.
            stop: Row behind its last.
        """
        with self._reading:
            if self._references is None:
                self._references = References(*read_references(embeddings, start, stop))
            return self._references


def top_of_block(job: SearchJob, place_range: PlaceRange, start: int, stop: int) -> TopK:
    """Run as a task: search one block of references for the queries of a range of places.

    Args:
        job: The search.
        place_range: The places.
        start: First row of the block.
        stop: Row behind its last.

    Returns:
        The finds of each place.
    """
    give_back()
    embeddings = job.open()
    row = np.searchsorted(place_range.places, embeddings.pairs.place[place_range.first : place_range.last])
    query = read_rows(embeddings.query, place_range.first, place_range.last)
    references = SharedBlock.of(job, start, stop).references(embeddings, start, stop)
    found = nearest_of(query, place_range.places[row], take(place_range.excluded, row), references, job.k)
    return by_place(row, found, len(place_range.places))


def write_rows(job: SearchJob, start: int, queries: list[tuple[int, int]], parts: list[TopK]) -> Counter[str]:
    """Run as a task: write the graph's rows from ``start``; no other task writes these Zarr shards.

    Args:
        job: The search.
        start: First row, at the beginning of a Zarr shard.
        queries: The first row of the queries of each part, and the row behind their last.
        parts: Finds of consecutive places.

    Returns:
        What was dropped as likely false negatives, as :func:`~geostream.mining.false_negatives.kept` counts it.
    """
    embeddings = job.open()
    made = [kept(embeddings, job.margin, *rows, found, job.wanted) for rows, found in zip(queries, parts, strict=True)]
    other = np.concatenate([part.other for part, _ in made])
    job.writer().write(start, other, np.concatenate([part.score for part, _ in made]))
    return sum((lost for _, lost in made), Counter())


def fold(parts: list[Item], merge: Callable[[Item, Item], Item]) -> Item:
    """Merge all parts in a balanced tree, neighbours first, so that few parts wait at a time.

    Args:
        parts: At least one.
        merge: Merges two parts into one.
    """
    waiting: list[tuple[int, Item]] = []
    for part in parts:
        height = 0
        while waiting and waiting[-1][0] == height:
            part, height = merge(waiting.pop()[1], part), height + 1
        waiting.append((height, part))
    while len(waiting) > 1:
        _, last = waiting.pop()
        waiting.append((0, merge(waiting.pop()[1], last)))
    return waiting[0][1]


def identity(place_range: PlaceRange) -> PlaceRange:
    """Run as a task: return the range, so that the cluster stores it once instead of once for each task."""
    return place_range


def search_range(
    client: Any, job: SearchJob, number: int, place_range: Any, blocks: list[tuple[int, int]], priority: int
) -> Any:
    """Submit the tasks that search all blocks of references for a range of places.

    Args:
        client: A Dask client.
        job: The search.
        number: Number of the range, for the tasks' names.
        place_range: A future of the range.
        blocks: The first row of each block of references, and the row behind its last.
        priority: Dask's priority of these tasks.

    Returns:
        A future of the finds.
    """
    found = [
        submit(client, f"mine-block-{number}-{block}", top_of_block, job, place_range, *rows, priority=priority)
        for block, rows in enumerate(blocks)
    ]
    merge_name = f"mine-merge-{number}"
    return fold(found, lambda one, two: submit(client, merge_name, merge, one, two, priority=priority + 1))


def search(client: Any, job: SearchJob, embeddings: Embeddings, excluded: Csr) -> list[Any]:
    """Submit the whole search.

    Args:
        client: A Dask client.
        job: The search.
        embeddings: The embeddings to search.
        excluded: For every place id, a list of ids that are no neighbours.

    Returns:
        A future for each range of the graph's rows, done when the range is written.
    """
    places = distinct(embeddings.pairs.place)
    blocks = reference_blocks(len(embeddings.reference_place))
    most = QUERIES if len(blocks) > 1 else SLICE  # a single block is read only once, and small tasks keep cores busy
    writes, ranges = [], count()
    for number, (start, stop) in enumerate(row_groups(len(places), len(embeddings.pairs), QUERIES)):
        priority = -2 * number  # merges go before blocks, blocks of these queries before those of the next
        parts, queries = [], []
        for some, first, last in place_ranges(places[start:stop], embeddings.pairs.place, most):
            place_range = PlaceRange(first, last, some, take(excluded, some))
            range_number = next(ranges)
            held = submit(client, f"mine-range-{range_number}", identity, place_range, priority=priority)
            parts.append(search_range(client, job, range_number, held, blocks, priority))
            queries.append((first, last))
        writes.append(
            submit(client, f"mine-write-{number}", write_rows, job, start, queries, parts, priority=priority + 1)
        )
    return writes
