"""The exact visual search: blocks of queries × blocks of references as Dask tasks, merged in a tree.

Each task reads QUERIES queries and BLOCK references at most and finds the K most similar in it; a tree of tasks merges
what the blocks of references gave, and the last one writes the Zarr shards of the graph that belong to its queries, it
alone. Between workers travel (QUERIES, K) finds. A thread holds its block of references until it needs another, and
threads of one process that search the same one share it: where there is one block only it is read once.
Tasks of later queries wait until those of earlier ones have run, so besides the blocks themselves a cluster holds the
finds of about its threads plus the height of the tree, whatever N is: per thread BLOCK × D × 4 bytes, QUERIES × D × 4
and some 6 × QUERIES × K × 8: 220 MB at D = 1024, K = 128.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from threading import Lock, get_ident
from typing import Any, ClassVar, TypeVar
from uuid import uuid4
from weakref import WeakValueDictionary

import numpy as np

from geostream.arrays import Csr, Float32, Int32, take
from geostream.dask import give_back
from geostream.mining.embeddings import CHUNK_ROWS, Embeddings, open_embeddings, read_rows
from geostream.mining.graph import SHARD_ROWS, GraphWriter
from geostream.mining.topk import SLICE, Found, References, merge, nearest_of, of_places
from geostream.store import Store

BLOCK = 32_768  # references of a block: 128 MiB at 1024 dimensions; each fills its lists of finds anew
QUERIES = 8_192  # of a block: their finds take memory, too
GROUPS = 8  # of queries at least, as far as there are Zarr shards: several cores have work to the end

Part = TypeVar("Part")


@dataclass(frozen=True)
class Job:
    """What every task of a search must know."""

    run: Store
    embeddings: str  # path within the run
    graph: str  # path of the graph being written
    k: int
    token: str = field(default_factory=lambda: uuid4().hex)  # tells searches apart

    def open(self) -> Embeddings:
        return _opened(self)

    def writer(self) -> GraphWriter:
        return GraphWriter.reopen(self.run, self.graph)


@lru_cache(maxsize=1)
def _opened(job: Job) -> Embeddings:
    """Once in a process, not by each task: opening costs 20 ms of Python, which other threads wait for."""
    return open_embeddings(job.run, job.embeddings, None)


@dataclass(frozen=True)
class Piece:
    """Some places in a row and their queries."""

    first: int  # rows of the queries: from here
    last: int  # to here
    places: Int32  # (n,) place ids
    excluded: Csr  # n lists of place ids that are no neighbours

    @classmethod
    def of(cls, places: Int32, rows: Sequence[int], excluded: Csr) -> Piece:
        """Of ``places``, whose queries are the rows from ``rows[0]`` to ``rows[1]``."""
        return cls(rows[0], rows[1], places, take(excluded, places))


def groups(n_places: int, n_queries: int) -> list[tuple[int, int]]:
    """Ranges of a graph's rows that are whole Zarr shards and have about equally many, at most about QUERIES."""
    shards = -(-n_places // SHARD_ROWS)
    ends = np.linspace(0, shards, min(shards, max(GROUPS, -(-n_queries // QUERIES))) + 1).astype(int) * SHARD_ROWS
    return [(int(start), int(min(end, n_places))) for start, end in pairwise(ends)]


def pieces(places: Int32, pair_place: Int32, excluded: Csr, most: int) -> list[Piece]:
    """Neighbouring ``places`` (sorted ids) as pieces of at most ``most`` queries each, or one place.

    ``pair_place``: (P,) place of every query, sorted; ``excluded``: lists over all place ids.
    """
    row = np.append(np.searchsorted(pair_place, places), np.searchsorted(pair_place, places[-1] + 1))
    cut = [0]
    while cut[-1] < len(places):
        cut.append(max(cut[-1] + 1, int(np.searchsorted(row, row[cut[-1]] + most, side="right")) - 1))
    return [Piece.of(places[a:b], row[[a, b]].tolist(), excluded) for a, b in pairwise(cut)]


def reference_blocks(n: int) -> list[tuple[int, int]]:
    """Ranges of the references: at most BLOCK rows, about equally many, cut where a chunk of the embeddings ends."""
    ends = np.linspace(0, -(-n // CHUNK_ROWS), -(-n // BLOCK) + 1).astype(int) * CHUNK_ROWS
    return [(int(start), int(min(end, n))) for start, end in pairwise(ends)]


def read_references(embeddings: Embeddings, start: int, stop: int) -> tuple[Int32, Float32]:
    """Ids and vectors of these references; tiles that no training query belongs to are left away."""
    ids = embeddings.reference_place[start:stop]
    vectors = read_rows(embeddings.reference, start, stop)
    wanted = np.isin(ids, embeddings.pairs.place)
    return (ids, vectors) if wanted.all() else (ids[wanted], vectors[wanted])


class Held:
    """A block of references. It lives until no thread of this process has it as the last that it searched."""

    _all: ClassVar[WeakValueDictionary[tuple[str, int, int], Held]] = WeakValueDictionary()
    _of_thread: ClassVar[dict[int, Held]] = {}
    _choosing = Lock()

    def __init__(self) -> None:
        self._reading = Lock()
        self._references: References | None = None

    @classmethod
    def of(cls, job: Job, start: int, stop: int) -> Held:
        with cls._choosing:
            held = cls._all.setdefault((job.token, start, stop), cls())
            cls._of_thread[get_ident()] = held
            return held

    @classmethod
    def let_go(cls) -> None:
        """What searches left in this process."""
        with cls._choosing:
            cls._of_thread.clear()
        _opened.cache_clear()

    def references(self, embeddings: Embeddings, start: int, stop: int) -> References:
        """Read by the first who asks."""
        with self._reading:
            if self._references is None:
                self._references = References(*read_references(embeddings, start, stop))
            return self._references


def top_of_block(job: Job, piece: Piece, start: int, stop: int) -> Found:
    """A task: (n, K) most similar of the references ``start`` to ``stop`` for each place of the piece."""
    give_back()
    embeddings = job.open()
    row = np.searchsorted(piece.places, embeddings.pairs.place[piece.first : piece.last])
    query = read_rows(embeddings.query, piece.first, piece.last)
    references = Held.of(job, start, stop).references(embeddings, start, stop)
    found = nearest_of(query, piece.places[row], take(piece.excluded, row), references, job.k)
    return of_places(row, found, len(piece.places))


def write_rows(job: Job, start: int, parts: list[Found]) -> None:
    """A task, the only one that writes these Zarr shards: the rows from ``start``, of all pieces of the group."""
    other = np.concatenate([part.other for part in parts])
    job.writer().write(start, other, np.concatenate([part.score for part in parts]))


def fold(parts: list[Part], merge: Callable[[Part, Part], Part]) -> Part:
    """All parts merged in a balanced tree, neighbours first; few wait at a time where they come in order."""
    waiting: list[tuple[int, Part]] = []
    for part in parts:
        height = 0
        while waiting and waiting[-1][0] == height:
            part, height = merge(waiting.pop()[1], part), height + 1
        waiting.append((height, part))
    while len(waiting) > 1:
        _, last = waiting.pop()
        waiting.append((0, merge(waiting.pop()[1], last)))
    return waiting[0][1]


def same(piece: Piece) -> Piece:
    """A task, so that a piece lies with the scheduler once, not with each of its tasks."""
    return piece


def tasks_of_piece(client: Any, job: Job, piece: Any, blocks: list[tuple[int, int]], priority: int) -> Any:
    """The future of a piece's finds over all blocks of references; ``piece`` is a future, too."""

    def submit(work: Callable[..., Found], *arguments: Any, soon: int = 0) -> Any:
        return client.submit(work, *arguments, pure=False, priority=priority + soon)

    return fold(
        [submit(top_of_block, job, piece, *block) for block in blocks],
        lambda one, two: submit(merge, one, two, soon=1),
    )


def search(client: Any, job: Job, embeddings: Embeddings, excluded: Csr) -> list[Any]:
    """Submit the whole search; its futures, one for each range of the graph's rows, done when that is written."""
    places = np.unique(embeddings.pairs.place)
    blocks = reference_blocks(len(embeddings.reference_place))
    most = QUERIES if len(blocks) > 1 else SLICE  # where no task reads a block again, small ones keep all cores busy
    writes = []
    for number, (start, stop) in enumerate(groups(len(places), len(embeddings.pairs))):
        priority = -2 * number  # merges go before blocks, blocks of these queries before those of the next
        parts = []
        for piece in pieces(places[start:stop], embeddings.pairs.place, excluded, most):
            held = client.submit(same, piece, pure=False, priority=priority)
            parts.append(tasks_of_piece(client, job, held, blocks, priority))
        writes.append(client.submit(write_rows, job, start, parts, pure=False, priority=priority + 1))
    return writes
