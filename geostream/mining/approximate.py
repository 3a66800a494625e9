"""Search neighbours approximately, by Dask tasks over inverted lists that are kept on the store during the search.

1. Centroids of partitions are trained on a sample of the references.
2. Each block of queries and of references is read once and written again as one object, sorted by partition.
3. One task for each partition trains the centroids of its lists, and writes its vectors as objects sorted by list. Then
   the objects of step 2 are removed.
4. A sample of queries is searched exactly. It shows how many lists must be searched for the wanted recall.
5. Each task reads the queries of some consecutive lists and, BLOCK rows at a time, the references of all lists that
   they search. It writes its finds, sorted by query, as one object.
6. One task for each range of whole Zarr shards of the graph collects the finds and writes the shards.

Workers need only the store, and a task that runs twice writes the same objects again. Every vector on the store has
its row number with it, so the client need not send row numbers to the tasks, and few tasks wait at a time.

What is held, in bytes, whatever N is: a thread at most four blocks of BLOCK × D × 4 and six times the finds of QUERIES
queries, QUERIES × K × 8 (0.5 GB at D = 1024 and K = 128; 0.1 GB at D = 128 and K = 64). A task that writes holds four
times WRITTEN × K × 8. The task that trains the partitions holds 65,536 vectors twice (0.5 GB at D = 1024). What grows
with N: the client holds 12 bytes a vector and, twice for a moment, N / 256 rows of 512 list numbers (8 bytes a
reference), beside the places and their excluded lists; every process holds the place ids of the embeddings, 10 bytes a
vector. The store holds the vectors three times for a while, and the finds twice.

Time grows with N, except for three small parts that grow with N²: the ranges that step 3 reads, (N / BLOCK) × (N /
PARTITION), those that step 6 reads, and the comparison of all centroids. See docs/notes/mining.md for what they take.

Where too many lists would have to be searched, the exact search is as fast and is used instead. This is always the case
for vectors without local structure (uniform noise). Beyond EXACT_MOST references the exact search would take hours.
There MOST_PROBES lists are searched at most, and the graph says which recall that gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from joblib import cpu_count

from geostream.arrays import Csr, Float32, Int32, Int64, distinct, take
from geostream.dask import give_back, in_turn, results, submit
from geostream.layout.zarr_groups import claim_scratch, scratch_object
from geostream.mining.embeddings import CHUNK_ROWS, Embeddings, pick_rows, read_rows
from geostream.mining.exact import (
    BLOCK,
    QUERIES,
    SearchJob,
    fold,
    has_query,
    place_ranges,
    read_references,
    reference_blocks,
    row_groups,
)
from geostream.mining.false_negatives import kept
from geostream.mining.ivf import (
    MOST_TRAINED_ON,
    PARTITION_TRAINED_ON,
    TRAINED_ON,
    SortedObjects,
    Spans,
    assign,
    choose_nprobe,
    n_lists,
    n_partitions,
    nearest_lists,
    pieces_of,
    train,
)
from geostream.mining.topk import References, TopK, by_place, merge, nearest_of, no_finds
from geostream.progress import track

SAMPLE = 1000  # queries that are searched exactly
SAMPLED_CHUNKS = 2048  # chunks of the embeddings that the sample of references comes from, at most
WORTH = 0.25  # share of the references; if more must be searched, the exact search is as fast
EXACT_MOST = 1_000_000  # references that are searched exactly where lists do not help; takes an hour on two cores
WRITTEN = 65_536  # queries whose finds one task collects; with few, each would read a little from very many objects
CENTROIDS = 4096  # centroids that a task compares with all others

Piece = list[tuple[int, int, int]]  # number of an object, first row in it, row behind the last


def sampled(job: SearchJob, kind: str, rows: Int64) -> Float32:
    """Run as a task: read some sampled vectors.

    Args:
        job: The search.
        kind: "query" or "reference".
        rows: (n,) rows to read, sorted.

    Returns:
        (n, D) vectors.
    """
    return pick_rows(getattr(job.open(), kind), rows)


def together(parts: list[Float32]) -> Float32:
    """Run as a task: put sampled vectors into one array."""
    return np.concatenate(parts)


def centroids_of(parts: list[Float32], n: int) -> Float32:
    """Run as a task: train the centroids of ``n`` partitions on sampled vectors."""
    return train(np.concatenate(parts), n, threads=cpu_count())


def sort_block(job: SearchJob, kind: str, number: int, start: int, stop: int, centroids: Float32) -> Int64:
    """Run as a task: assign a block's vectors to partitions and write them as one object, sorted by partition.

    Args:
        job: The search.
        kind: "query" or "reference".
        number: Number of the block among those of its kind.
        start: First row of the block.
        stop: Row behind its last.
        centroids: (P, D) centroids of the partitions.

    Returns:
        (P,) vectors of each partition. References without a training query are left out.
    """
    give_back()
    embeddings = job.open()
    vectors, rows = read_rows(getattr(embeddings, kind), start, stop), np.arange(start, stop, dtype=np.int32)
    if kind == "reference" and not (wanted := has_query(embeddings, embeddings.reference_place[start:stop])).all():
        vectors, rows = vectors[wanted], rows[wanted]
    return _write_sorted(job, kind, number, vectors, rows, assign(vectors, centroids), len(centroids))[0]


def _write_sorted(
    job: SearchJob, kind: str, number: int, vectors: Float32, rows: Int32, of: Int32, n: int
) -> tuple[Int64, Int32]:
    """Write vectors and their rows as one object, sorted by their list or partition ``of``, of which there are ``n``.

    Returns:
        (n,) how many vectors each has, and (len(rows),) the rows in the order in which they were written.
    """
    order = np.argsort(of, kind="stable")
    numbers = np.empty((len(rows), vectors.shape[1] + 1), dtype=np.float32)
    numbers[:, :-1], numbers[:, -1] = vectors[order], rows[order].view(np.float32)
    job.run.write(scratch_object(job.graph, kind, number), numbers.tobytes())
    return np.bincount(of, minlength=n), rows[order]


def _read(job: SearchJob, kind: str, spans: Piece, columns: int) -> Float32:
    """Read rows of some objects, (n, columns) of four bytes each, in the order of the spans."""

    def read(span: tuple[int, int, int]) -> bytes:
        number, first, last = span
        name = scratch_object(job.graph, kind, number)
        return job.run.read_range(name, 4 * columns * first, 4 * columns * (last - first))

    with ThreadPoolExecutor(8) as threads:
        data = b"".join(threads.map(read, spans))
    return np.frombuffer(data, dtype=np.float32).reshape(-1, columns)


class Partition(NamedTuple):
    """What a task is told of one partition: the pieces that its objects are made of, at most BLOCK rows each."""

    number: int
    references: list[Piece]
    queries: list[Piece]
    first_reference: int  # number of the first object of references that is written
    first_query: int


class Lists(NamedTuple):
    """What a task has made of one partition; for each object the sizes of its lists, and its rows sorted by list."""

    number: int  # of the partition
    centroids: Float32  # (L, D) of its lists
    references: list[tuple[Int64, Int32]]
    queries: list[tuple[Int64, Int32]]


def make_lists(job: SearchJob, partition: Partition, centroids: Float32) -> Lists:
    """Run as a task: train the centroids of a partition's lists, and write its vectors sorted by list.

    Args:
        job: The search.
        partition: The partition.
        centroids: (P, D) centroids of all partitions.
    """
    give_back()
    columns = centroids.shape[1] + 1

    @lru_cache(maxsize=1)  # most partitions are one piece, which is needed twice
    def references(piece: int) -> Float32:
        return _read(job, "reference", partition.references[piece], columns)

    sizes = [sum(last - first for _, first, last in piece) for piece in partition.references]
    count, size = n_lists(sum(sizes)), sum(sizes)
    if size:
        rng = np.random.default_rng(partition.number)
        chosen = np.sort(rng.choice(size, min(size, count * TRAINED_ON), replace=False))
        starts = np.concatenate([[0], np.cumsum(sizes)])
        picked = [chosen[(chosen >= a) & (chosen < b)] - a for a, b in pairwise(starts)]
        own = train(np.concatenate([references(piece)[rows, :-1] for piece, rows in enumerate(picked)]), count)
    else:
        own = centroids[partition.number][None]

    def write(kind: str, number: int, block: Float32) -> tuple[Int64, Int32]:
        vectors, rows = np.ascontiguousarray(block[:, :-1]), block[:, -1].copy().view(np.int32)
        return _write_sorted(job, f"{kind}-lists", number, vectors, rows, assign(vectors, own), len(own))

    made = [write("reference", partition.first_reference + piece, references(piece)) for piece in range(len(sizes))]
    references.cache_clear()
    of_queries = [
        write("query", partition.first_query + piece, _read(job, "query", spans, columns))
        for piece, spans in enumerate(partition.queries)
    ]
    return Lists(partition.number, own, made, of_queries)


def near_lists(job: SearchJob, start: int, stop: int) -> tuple[int, Int32]:
    """Run as a task: return ``start``, and for the lists from it to ``stop`` those to search, the nearest first."""
    stored = job.run.read(scratch_object(job.graph, "centroids", 0))
    centroids = np.frombuffer(stored, dtype=np.float32).reshape(-1, job.open().dim)
    return start, nearest_lists(centroids, start, min(stop, len(centroids)))


def top_of_sample(job: SearchJob, query: Float32, own: Int32, excluded: Csr, start: int, stop: int) -> TopK:
    """Run as a task: search one block of references exactly for the sampled queries.

    Args:
        job: The search.
        query: (Q, D) the sampled queries' vectors.
        own: (Q,) place id of each query.
        excluded: Q lists of further ids that are no neighbours.
        start: First row of the block.
        stop: Row behind its last.

    Returns:
        The finds of the Q queries.
    """
    references = References(*read_references(job.open(), start, stop))
    return nearest_of(query, own, Csr(*excluded), references, job.k)


def search_lists(
    job: SearchJob, number: int, queries: Spans, references: list[Spans], near: Int32, excluded: Csr
) -> None:
    """Run as a task: search the queries of some consecutive lists, and write their finds sorted by query.

    Args:
        job: The search.
        number: Number of the task, which is part of the written object's name.
        queries: The queries of the lists.
        references: The references to search, in slices of at most BLOCK rows.
        near: (n, probes) lists to search for each of the n lists of queries, itself first.
        excluded: A list of place ids that are no neighbours for each query, in the order in which they are read.
    """
    give_back()
    embeddings, excluded = job.open(), Csr(*excluded)
    numbers = _read(job, "query-lists", queries.spans, embeddings.dim + 1)
    rows, query = numbers[:, -1].copy().view(np.int32), np.ascontiguousarray(numbers[:, :-1])
    del numbers
    own = embeddings.pairs.place[rows]
    ends = np.concatenate([[0], np.cumsum(queries.sizes)])
    best = no_finds(len(rows), job.k)
    for part in references:
        numbers = _read(job, "reference-lists", part.spans, embeddings.dim + 1)
        of_list = np.repeat(part.lists, part.sizes)
        by_list = np.argsort(of_list, kind="stable")
        vectors, of_list = numbers[:, :-1][by_list], of_list[by_list]
        ids = embeddings.reference_place[numbers[by_list, -1].view(np.int32)]
        del numbers
        for probed, first, last in zip(near, ends[:-1], ends[1:], strict=True):
            here = [slice(*np.searchsorted(of_list, [one, one + 1])) for one in np.sort(probed)]
            some = np.concatenate([ids[one] for one in here])
            if first == last or not len(some):
                continue
            mine = slice(first, last)
            block = References(some, np.concatenate([vectors[one] for one in here]))
            found = nearest_of(query[mine], own[mine], take(excluded, np.arange(first, last)), block, job.k)
            if len(references) > 1:
                found = merge(TopK(best.other[mine], best.score[mine]), found)
            best.other[mine], best.score[mine] = found.other, found.score
    back = np.argsort(rows)
    finds = np.concatenate([rows[back, None], best.other[back], best.score[back].view(np.int32)], axis=1)
    job.run.write(scratch_object(job.graph, "finds", number), finds.tobytes())


def write_group(job: SearchJob, start: int, first: int, last: int, finds: Piece) -> Counter[str]:
    """Run as a task: write the graph's rows from ``start``; no other task writes these Zarr shards.

    Args:
        job: The search.
        start: First row of the graph, at the beginning of a Zarr shard.
        first: First query of these places.
        last: Query behind their last.
        finds: Where the finds of these queries are.

    Returns:
        What was dropped as likely false negatives, as :func:`~geostream.mining.false_negatives.kept` counts it.
    """
    give_back()
    embeddings = job.open()
    place = embeddings.pairs.place[first:last]
    numbers = _read(job, "finds", finds, 1 + 2 * job.k).view(np.int32)
    numbers = numbers[np.argsort(numbers[:, 0])]
    made = []
    for places, a, b in place_ranges(distinct(place), place, QUERIES):
        found = TopK(numbers[a:b, 1 : 1 + job.k], numbers[a:b, 1 + job.k :].copy().view(np.float32))
        found = by_place(np.searchsorted(places, place[a:b]), found, len(places))
        made.append(kept(embeddings, job.margin, first + a, first + b, found, job.wanted))
    other = np.concatenate([part.other for part, _ in made])
    job.writer().write(start, other, np.concatenate([part.score for part, _ in made]))
    return sum((lost for _, lost in made), Counter())


class Approximate:
    """Run one approximate search from the client: call :meth:`prepare`, and if it is worthwhile :meth:`search`.

    Args:
        client: A Dask client.
        job: The search.
        embeddings: The embeddings to search.
        excluded: For every place id, a list of ids that are no neighbours.
    """

    def __init__(self, client: Any, job: SearchJob, embeddings: Embeddings, excluded: Csr) -> None:
        self._client, self._job, self._embeddings, self._excluded = client, job, embeddings, excluded
        self._near: Int32  # (L, probes) lists to search for the queries of each list

    def _submit(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        return submit(self._client, f"mine-{name}", work, *arguments)

    def prepare(self, wanted: float) -> dict[str, Any]:
        """Sort all vectors into lists, and measure how many lists must be searched.

        Args:
            wanted: The recall to reach, measured on a sample of queries.

        Returns:
            The facts that the graph records about its search. ``mode`` is "approximate" if the search is worthwhile;
            else it is "exact", and ``because`` says why.
        """
        embeddings, place, rng = self._embeddings, self._embeddings.pairs.place, np.random.default_rng(0)
        rows = np.sort(rng.choice(len(place), min(len(place), SAMPLE), replace=False))
        truth = self._search_sample(rows)
        centroids, n_references = self._make_partitions(rng)
        list_of_query, list_of_reference = self._make_lists(centroids)
        true = truth.result().other
        at = np.searchsorted(embeddings.reference_place, np.maximum(true, 0))
        found_in = np.where(true >= 0, list_of_reference[at], -1).astype(np.int32)
        self._probes, recall, enough = choose_nprobe(self._near, list_of_query[rows], found_in, wanted)
        self._near = self._near[:, : self._probes].copy()
        n = len(self._near)
        queries, references = self._queries.list_sizes(n), self._references.list_sizes(n)
        searched = sum(references[column] for column in self._near.T)
        share = float(searched @ queries) / len(place) / n_references
        if share > WORTH or (not enough and n_references <= EXACT_MOST):
            more = "" if enough else "more than "
            return {"mode": "exact", "because": f"recall {wanted} needs {more}{share:.0%} of all references"}
        return {
            "mode": "approximate",
            "recall": recall,
            "wanted": wanted,
            "probes": self._probes,
            "lists": n,
            "sample": len(rows),
            "share": share,
        }

    def _search_sample(self, rows: Int64) -> Any:
        """Submit the exact search of some queries; return a future of the finds."""
        own = self._embeddings.pairs.place[rows]
        excluded = tuple(take(self._excluded, own))
        query = self._submit("sample", together, self._pick("query", rows))
        return fold(
            [
                self._submit(f"sample-{number}", top_of_sample, self._job, query, own, excluded, *block)
                for number, block in enumerate(reference_blocks(len(self._embeddings.reference_place)))
            ],
            lambda one, two: self._submit("merge", merge, one, two),
        )

    def _make_partitions(self, rng: np.random.Generator) -> tuple[Any, int]:
        """Submit the training of the partitions; return a future of the centroids, and how many references count."""
        training = np.flatnonzero(has_query(self._embeddings, self._embeddings.reference_place))
        n_references, count = len(training), n_partitions(len(training))
        chunks = -(-len(self._embeddings.reference_place) // CHUNK_ROWS)
        if chunks > SAMPLED_CHUNKS:  # else a sample of ten million references would read them all
            some = np.zeros(chunks, dtype=bool)
            some[rng.choice(chunks, SAMPLED_CHUNKS, replace=False)] = True
            training = training[some[training // CHUNK_ROWS]]
        size = min(len(training), max(count * PARTITION_TRAINED_ON, count), MOST_TRAINED_ON)
        sample = np.sort(rng.choice(training, size, replace=False))
        return self._submit("centroids", centroids_of, self._pick("reference", sample), count), n_references

    def _pick(self, kind: str, rows: Int64) -> list[Any]:
        """Return futures of the vectors with these row numbers, sorted."""
        blocks = reference_blocks(getattr(self._embeddings, kind).shape[0])
        parts = [rows[slice(*np.searchsorted(rows, block))] for block in blocks]
        parts = [part for part in parts if len(part)]
        return [self._submit(f"pick-{n}", sampled, self._job, kind, part) for n, part in enumerate(parts)]

    def _make_lists(self, centroids: Any) -> tuple[Int32, Int32]:
        """Sort all vectors by partition, and then by list.

        Args:
            centroids: A future of the centroids of the partitions.

        Returns:
            The list of each query, and of each reference (0 for those that are left out).
        """
        job, embeddings = self._job, self._embeddings
        blocks = {
            "query": reference_blocks(len(embeddings.pairs)),
            "reference": reference_blocks(len(embeddings.reference_place)),
        }
        claim_scratch(job.run, job.graph, **{kind: len(of_kind) for kind, of_kind in blocks.items()})
        futures = {
            kind: [
                self._submit(f"sort-{kind}-{number}", sort_block, job, kind, number, *at, centroids)
                for number, at in enumerate(of_kind)
            ]
            for kind, of_kind in blocks.items()
        }
        both = [*futures["query"], *futures["reference"]]
        for _ in track(results(both), "partitions", len(both)):
            pass
        pieces = {kind: _pieces(np.stack(self._client.gather(of_kind))) for kind, of_kind in futures.items()}
        partitions, written = [], {"query": 0, "reference": 0}
        for number, (references, queries) in enumerate(zip(pieces["reference"], pieces["query"], strict=True)):
            partitions.append(Partition(number, references, queries, written["reference"], written["query"]))
            written["reference"] += len(references)
            written["query"] += len(queries)
        claim_scratch(job.run, job.graph, **{f"{kind}-lists": count for kind, count in written.items()})
        tasks = ((job, partition, centroids) for partition in partitions)
        made = list(track(in_turn(self._client, "mine-lists", make_lists, tasks), "inverted lists", len(partitions)))
        job.run.delete_all(
            scratch_object(job.graph, kind, number)
            for kind, of_kind in blocks.items()
            for number in range(len(of_kind))
        )
        return self._collect(sorted(made, key=lambda lists: lists.number))

    def _collect(self, made: list[Lists]) -> tuple[Int32, Int32]:
        """Note where all lists are, and which lists are near which; return the list of each query and reference."""
        self._queries, self._references, self._rows = SortedObjects(), SortedObjects(), list[Int32]()
        of_query = np.zeros(len(self._embeddings.pairs), dtype=np.int32)
        of_reference = np.zeros(len(self._embeddings.reference_place), dtype=np.int32)
        first = 0
        for lists in made:
            for objects, of, parts in (
                (self._queries, of_query, lists.queries),
                (self._references, of_reference, lists.references),
            ):
                for sizes, rows in parts:
                    objects.first_list.append(first)
                    objects.sizes.append(sizes)
                    of[rows] = first + np.repeat(np.arange(len(sizes)), sizes)
            self._rows += [rows.copy() for _, rows in lists.queries]  # else the whole message would stay
            first += len(lists.centroids)
        claim_scratch(self._job.run, self._job.graph, centroids=1)
        centroids = np.concatenate([lists.centroids for lists in made])
        self._job.run.write(scratch_object(self._job.graph, "centroids", 0), centroids.tobytes())
        tasks = ((self._job, start, start + CENTROIDS) for start in range(0, first, CENTROIDS))
        near = dict(in_turn(self._client, "mine-near", near_lists, tasks))
        self._near = np.concatenate([near[start] for start in sorted(near)])
        return of_query, of_reference

    def search(self) -> tuple[int, Iterator[Counter[str]]]:
        """Search all lists, and write the graph.

        Returns:
            How many tasks write the graph, and their results as they come.
        """
        parts = [part for number in range(len(self._rows)) for part in self._queries.parts(number, QUERIES)]
        claim_scratch(self._job.run, self._job.graph, finds=len(parts))
        searches = in_turn(self._client, "mine-search", search_lists, self._searches(parts))
        for _ in track(searches, "neighbours", len(parts)):
            pass
        del self._near
        place = self._embeddings.pairs.place
        places = distinct(place)
        groups = row_groups(len(places), len(place), WRITTEN)
        return len(groups), in_turn(self._client, "mine-write", write_group, self._writes(parts, places, groups))

    def _rows_of(self, part: Spans) -> Int32:
        """Return the queries of a part, in the order in which they are read."""
        ((number, first, last),) = part.spans
        return self._rows[number][first:last]

    def _searches(self, parts: list[Spans]) -> Iterator[tuple[Any, ...]]:
        """Yield the arguments of the tasks that search."""
        for number, queries in enumerate(parts):
            near = self._near[queries.lists]
            references = self._references.slices_of(distinct(near), BLOCK)
            excluded = tuple(take(self._excluded, self._embeddings.pairs.place[self._rows_of(queries)]))
            yield self._job, number, queries, references, near, excluded

    def _writes(self, parts: list[Spans], places: Int32, groups: list[tuple[int, int]]) -> Iterator[tuple[Any, ...]]:
        """Yield the arguments of the tasks that write the graph; ``parts`` are the queries of those that searched."""
        place = self._embeddings.pairs.place
        for rows in map(self._rows_of, parts):
            rows.sort()  # as the finds were written
        for start, stop in groups:
            first, last = np.searchsorted(place, [places[start], places[stop - 1] + 1]).tolist()
            ends = [np.searchsorted(self._rows_of(part), [first, last]).tolist() for part in parts]
            spans = [(number, a, b) for number, (a, b) in enumerate(ends) if a < b]
            yield self._job, start, first, last, spans


def _pieces(counts: npt.NDArray[np.integer]) -> list[list[Piece]]:
    """Return the pieces of every partition from (blocks, partitions) counts."""
    starts = np.cumsum(counts, axis=1) - counts
    return [pieces_of(of, at, BLOCK) for of, at in zip(counts.T, starts.T, strict=True)]
