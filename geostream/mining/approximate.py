"""Search neighbours approximately, by Dask tasks over inverted lists that are kept on the store during the search.

1. Centroids are trained on a sample of the references.
2. Each block of queries and of references is read once and written again as one object (a *run*), sorted by list.
3. A sample of queries is searched exactly. It shows how many lists must be searched for the wanted recall.
4. Each task reads some lists of queries and, BLOCK rows at a time, the references of all lists that they search. It
   writes its finds, sorted by query, as one object.
5. One task for each range of whole Zarr shards of the graph collects the finds and writes the shards.

Workers need only the store, and a task that runs twice writes the same objects again. A thread holds at most four
blocks of BLOCK rows and the finds of one: 0.5 GB at D = 1024 and K = 128, whatever N is. The client holds about 40
bytes a vector. The task that trains the centroids holds 65,536 vectors twice (0.5 GB). The store holds the vectors and
finds a second time until the search ends. Where too many lists would have to be searched, the exact search is as fast
and is used instead. This is always the case for vectors without local structure (uniform noise).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from geostream.arrays import Csr, Float32, Int32, Int64, take
from geostream.dask import give_back, results, submit
from geostream.layout.zarr_groups import claim_scratch, scratch_object
from geostream.mining.embeddings import Embeddings, read_rows
from geostream.mining.exact import (
    BLOCK,
    QUERIES,
    SearchJob,
    fold,
    place_ranges,
    read_references,
    reference_blocks,
    row_groups,
)
from geostream.mining.ivf import (
    TRAINED_ON,
    RunSlice,
    SortedRuns,
    assign,
    centroid_order,
    choose_nprobe,
    n_lists,
    run_order,
    split_by_size,
    train,
)
from geostream.mining.topk import References, TopK, by_place, merge, nearest_of, no_finds
from geostream.progress import track

SAMPLE = 1000  # queries that are searched exactly
WORTH = 0.25  # share of the references; if more must be searched, the exact search is as fast


def sampled(job: SearchJob, kind: str, start: int, stop: int, rows: Int64) -> Float32:
    """Run as a task: read some sampled vectors of one block.

    Args:
        job: The search.
        kind: "query" or "reference".
        start: First row of the block.
        stop: Row behind its last.
        rows: (n,) rows to read, all in the block.

    Returns:
        (n, D) vectors.
    """
    embeddings = job.open()
    return read_rows(getattr(embeddings, kind), start, stop)[rows - start]


def centroids_of(parts: list[Float32], lists: int) -> Float32:
    """Run as a task: train centroids on sampled vectors.

    Args:
        parts: The samples of all blocks, (n, D) each.
        lists: How many centroids to train.

    Returns:
        (L, D) centroids.
    """
    return train(np.concatenate(parts), lists)


def sort_block(job: SearchJob, kind: str, number: int, start: int, stop: int, centroids: Float32) -> Int32:
    """Run as a task: assign a block's vectors to lists and write them as a run, sorted by list.

    Args:
        job: The search.
        kind: "query" or "reference".
        number: Number of the block among those of its kind.
        start: First row of the block.
        stop: Row behind its last.
        centroids: (L, D) centroids of the lists.

    Returns:
        (stop - start,) list of each row, -1 for references without a training query.
    """
    give_back()
    embeddings = job.open()
    vectors = read_rows(getattr(embeddings, kind), start, stop)
    lists = assign(vectors, centroids)
    if kind == "reference":
        lists[~np.isin(embeddings.reference_place[start:stop], embeddings.pairs.place)] = -1
    job.run.write(_run(job, kind, number), vectors[run_order(lists)].tobytes())
    return lists


def top_of_sample(job: SearchJob, parts: list[Float32], own: Int32, excluded: Csr, start: int, stop: int) -> TopK:
    """Run as a task: search one block of references exactly for the sampled queries.

    Args:
        job: The search.
        parts: The sampled queries' vectors, (n, D) each; Q together.
        own: (Q,) place id of each query.
        excluded: Q lists of further ids that are no neighbours.
        start: First row of the block.
        stop: Row behind its last.

    Returns:
        The finds of the Q queries.
    """
    references = References(*read_references(job.open(), start, stop))
    return nearest_of(np.concatenate(parts), own, Csr(*excluded), references, job.k)


def search_lists(
    job: SearchJob, number: int, queries: RunSlice, references: list[RunSlice], near: Int32, excluded: Csr
) -> None:
    """Run as a task: search the queries of some consecutive lists, and write their finds sorted by query.

    Args:
        job: The search.
        number: Number of the task, which is part of the written object's name.
        queries: The queries of the lists.
        references: The references to search, in slices of at most BLOCK rows.
        near: (n, probes) lists to search for each of the n lists of queries, itself first.
        excluded: A list of ids that are no neighbours for each of ``queries.rows``.
    """
    give_back()
    embeddings = job.open()
    order = np.argsort(queries.lists, kind="stable")
    query = _read(job, "query", queries, embeddings.dim)[order]
    rows, lists, excluded = queries.rows[order], queries.lists[order], take(Csr(*excluded), order)
    own = embeddings.pairs.place[rows]
    best = no_finds(len(rows), job.k)
    for part in references:
        by_list = np.argsort(part.lists, kind="stable")
        vectors = _read(job, "reference", part, embeddings.dim)[by_list]
        ids, of_list = embeddings.reference_place[part.rows[by_list]], part.lists[by_list]
        for probed in near:
            mine = slice(*np.searchsorted(lists, [probed[0], probed[0] + 1]))  # the first list is the queries' own
            here = [slice(*np.searchsorted(of_list, [one, one + 1])) for one in np.sort(probed)]
            some = np.concatenate([ids[one] for one in here])
            if mine.start == mine.stop or not len(some):
                continue
            of_mine = take(excluded, np.arange(mine.start, mine.stop))
            block = np.concatenate([vectors[one] for one in here])
            found = nearest_of(query[mine], own[mine], of_mine, References(some, block), job.k)
            if len(references) > 1:
                found = merge(TopK(best.other[mine], best.score[mine]), found)
            best.other[mine], best.score[mine] = found.other, found.score
    back = np.argsort(rows)
    finds = np.concatenate([best.other[back], best.score[back].view(np.int32)], axis=1)
    job.run.write(_run(job, "finds", number), finds.tobytes())


def write_group(job: SearchJob, start: int, parts: list[tuple[Int32, RunSlice]]) -> None:
    """Run as a task: write the graph's rows from ``start``; no other task writes these Zarr shards.

    Args:
        job: The search.
        start: First row, at the beginning of a Zarr shard.
        parts: Ranges of consecutive places, each with the position of its queries' finds.
    """
    pair_place = job.open().pairs.place
    made = []
    for places, part in parts:
        numbers = _read(job, "finds", part, 2 * job.k).view(np.int32)
        found = TopK(numbers[:, : job.k], numbers[:, job.k :].copy().view(np.float32))
        made.append(by_place(np.searchsorted(places, pair_place[part.rows]), found, len(places)))
    other = np.concatenate([part.other for part in made])
    job.writer().write(start, other, np.concatenate([part.score for part in made]))


def _run(job: SearchJob, kind: str, number: int) -> str:
    return scratch_object(job.graph, kind, number)


def _read(job: SearchJob, kind: str, part: RunSlice, columns: int) -> Float32:
    """Read the slice's rows, (n, columns) of four bytes each, in the order of its spans."""

    def read(span: tuple[int, int, int]) -> bytes:
        run, first, last = span
        return job.run.read_range(_run(job, kind, run), 4 * columns * first, 4 * columns * (last - first))

    with ThreadPoolExecutor(8) as threads:
        data = b"".join(threads.map(read, part.spans))
    return np.frombuffer(data, dtype=np.float32).reshape(-1, columns)


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
        job, embeddings, rng = self._job, self._embeddings, np.random.default_rng(0)
        place = embeddings.pairs.place
        training = np.flatnonzero(np.isin(embeddings.reference_place, place))
        count = n_lists(len(training))
        sample = np.sort(rng.choice(training, min(len(training), count * TRAINED_ON), replace=False))
        centroids = self._submit("centroids", centroids_of, self._pick("reference", sample), count)
        rows = np.sort(rng.choice(len(place), min(len(place), SAMPLE), replace=False))
        queries, blocks = self._pick("query", rows), reference_blocks(len(embeddings.reference_place))
        of_sample = (place[rows], tuple(take(self._excluded, place[rows])))
        truth = fold(
            [
                self._submit(f"sample-{number}", top_of_sample, job, queries, *of_sample, *block)
                for number, block in enumerate(blocks)
            ],
            lambda one, two: self._submit("merge", merge, one, two),
        )
        starts, futures = [], []
        query_blocks = reference_blocks(len(place))
        claim_scratch(job.run, job.graph, query=len(query_blocks), reference=len(blocks))
        for kind, of_kind in (("query", query_blocks), ("reference", blocks)):
            starts.append([start for start, _ in of_kind])
            futures.append(
                [
                    self._submit(f"sort-{kind}-{number}", sort_block, job, kind, number, *at, centroids)
                    for number, at in enumerate(of_kind)
                ]
            )
        both = [*futures[0], *futures[1]]
        for _ in track(results(both), "inverted lists", len(both)):
            pass
        self._queries, self._references = (
            SortedRuns(self._client.gather(of_kind), first, count)
            for of_kind, first in zip(futures, starts, strict=True)
        )
        self._near = centroid_order(centroids.result())
        true = truth.result().other
        at = np.searchsorted(embeddings.reference_place, np.maximum(true, 0))
        found_in = np.where(true >= 0, self._references.lists[at], -1).astype(np.int32)
        self._probes, recall = choose_nprobe(self._near, self._queries.lists[rows], found_in, wanted)
        searched = self._references.sizes[self._near[:, : self._probes]].sum(axis=1)
        share = float(searched @ self._queries.sizes) / len(place) / len(training)
        if share > WORTH:
            return {"mode": "exact", "because": f"recall {wanted} needs {share:.0%} of all references"}
        if max(self._queries.sizes.max(), self._references.sizes.max()) > BLOCK:
            return {"mode": "exact", "because": f"a list of similar places holds more than {BLOCK} of them"}
        return {
            "mode": "approximate",
            "recall": recall,
            "wanted": wanted,
            "probes": self._probes,
            "lists": count,
            "sample": len(rows),
            "share": share,
        }

    def _pick(self, kind: str, rows: Int64) -> list[Any]:
        """Return futures of the vectors with these row numbers, sorted."""
        picked = []
        for start, stop in reference_blocks(getattr(self._embeddings, kind).shape[0]):
            here = rows[slice(*np.searchsorted(rows, [start, stop]))]
            if len(here):
                picked.append(self._submit(f"pick-{kind}-{len(picked)}", sampled, self._job, kind, start, stop, here))
        return picked

    def search(self) -> list[Any]:
        """Search all lists, and submit the tasks that write the graph.

        Returns:
            The futures of these tasks.
        """
        near = self._near[:, : self._probes]
        searches: list[Any] = []
        found: list[Int64] = []
        parts = split_by_size(self._queries.sizes, QUERIES)
        claim_scratch(self._job.run, self._job.graph, finds=len(parts))
        for lists in parts:
            lists = lists[self._queries.sizes[lists] > 0]
            if not len(lists):
                continue
            queries, wanted = self._queries.slice_of(lists), np.unique(near[lists])
            references = [
                self._references.slice_of(wanted[some]) for some in split_by_size(self._references.sizes[wanted], BLOCK)
            ]
            excluded = tuple(take(self._excluded, self._embeddings.pairs.place[queries.rows]))
            number = len(searches)
            task = (self._job, number, queries, references, near[lists], excluded)
            searches.append(self._submit(f"lists-{number}", search_lists, *task))
            found.append(np.sort(queries.rows))
        for _ in track(results(searches), "neighbours", len(searches)):
            pass
        return self._write(found)

    def _write(self, found: list[Int64]) -> list[Any]:
        """Submit the tasks that write the graph; ``found`` has the sorted queries of each task that searched."""
        places, pair_place = np.unique(self._embeddings.pairs.place), self._embeddings.pairs.place
        writes = []
        for start, stop in row_groups(len(places), len(pair_place)):
            parts = []
            for place_range in place_ranges(places[start:stop], pair_place, self._excluded, QUERIES):
                ranges = [np.searchsorted(rows, [place_range.first, place_range.last]).tolist() for rows in found]
                spans = [(number, first, last) for number, (first, last) in enumerate(ranges) if first < last]
                rows = np.concatenate([found[number][first:last] for number, first, last in spans])
                parts.append((place_range.places, RunSlice(spans, rows, np.zeros(0, dtype=np.int32))))
            writes.append(self._submit(f"write-{len(writes)}", write_group, self._job, start, parts))
        return writes
