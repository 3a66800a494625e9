"""The approximate visual search: Dask tasks over inverted lists, which lie on the store while the graph is made.

1. Centroids are trained on a sample of the references.
2. Each block of queries and of references is read once and written again, sorted by list, as one object (a *run*).
3. A sample of queries is searched exactly; from it follows how many lists must be searched for the wanted recall.
4. Each task reads some lists of queries and, BLOCK rows at a time, the references of all lists that they search, and
   writes what it found, sorted by query, as one object.
5. Each range of whole Zarr shards of the graph is put together from those by one task, and the objects are removed.

Workers need nothing but the store, and a task that runs twice writes the same objects again. A thread holds four blocks
of BLOCK rows and the finds of one at most: 0.5 GB at D = 1024 and K = 128, whatever N is; the client some 40 bytes a
vector; the one task that trains 65,536 vectors, twice (0.5 GB). The store holds all vectors and the finds a second time
until the end. Where too many lists must be searched the exact search is as quick, and taken: with vectors that have no
local structure (uniform noise) that is always so.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from geostream.arrays import Csr, Float32, Int32, Int64, take
from geostream.dask import give_back, results
from geostream.layout.zarr_groups import claim_scratch, scratch_object
from geostream.mining.embeddings import Embeddings, read_rows
from geostream.mining.exact import BLOCK, QUERIES, Job, fold, groups, pieces, read_references, reference_blocks
from geostream.mining.ivf import TRAINED_ON, Part, Runs, assign, cut, n_lists, nearness, run_order, train, width
from geostream.mining.topk import Found, References, merge, nearest_of, nothing, of_places
from geostream.progress import track

SAMPLE = 1000  # queries that are searched exactly
WORTH = 0.25  # of the references: where more must be searched, the exact search is as quick


def sampled(job: Job, kind: str, start: int, stop: int, rows: Int64) -> Float32:
    """A task: the vectors ``rows``, which lie between ``start`` and ``stop``."""
    embeddings = job.open()
    return read_rows(getattr(embeddings, kind), start, stop)[rows - start]


def centroids_of(parts: list[Float32], lists: int) -> Float32:
    """A task."""
    return train(np.concatenate(parts), lists)


def sort_block(job: Job, kind: str, number: int, start: int, stop: int, centroids: Float32) -> Int32:
    """A task: write a block's run; the list of each of its rows, -1 for references without a training query."""
    give_back()
    embeddings = job.open()
    vectors = read_rows(getattr(embeddings, kind), start, stop)
    lists = assign(vectors, centroids)
    if kind == "reference":
        lists[~np.isin(embeddings.reference_place[start:stop], embeddings.pairs.place)] = -1
    job.run.write(_run(job, kind, number), vectors[run_order(lists)].tobytes())
    return lists


def top_of_sample(job: Job, parts: list[Float32], own: Int32, excluded: Csr, start: int, stop: int) -> Found:
    """A task: the sampled queries' K most similar of the references ``start`` to ``stop``."""
    references = References(*read_references(job.open(), start, stop))
    return nearest_of(np.concatenate(parts), own, Csr(*excluded), references, job.k)


def search_lists(job: Job, number: int, queries: Part, references: list[Part], near: Int32, excluded: Csr) -> None:
    """A task: write the finds of the queries of some lists in a row, sorted by query.

    ``references``: at most BLOCK rows each; ``near``: (n, probes) lists to search for each of the queries' lists;
    ``excluded``: per query of ``queries.rows``, place ids that are no neighbours.
    """
    give_back()
    embeddings = job.open()
    order = np.argsort(queries.lists, kind="stable")
    query = _read(job, "query", queries, embeddings.dim)[order]
    rows, lists, excluded = queries.rows[order], queries.lists[order], take(Csr(*excluded), order)
    own = embeddings.pairs.place[rows]
    best = nothing(len(rows), job.k)
    for part in references:
        by_list = np.argsort(part.lists, kind="stable")
        vectors = _read(job, "reference", part, embeddings.dim)[by_list]
        ids, of_list = embeddings.reference_place[part.rows[by_list]], part.lists[by_list]
        for probed in near:
            mine = slice(*np.searchsorted(lists, [probed[0], probed[0] + 1]))  # a list is the first that it searches
            here = [slice(*np.searchsorted(of_list, [one, one + 1])) for one in np.sort(probed)]
            some = np.concatenate([ids[one] for one in here])
            if mine.start == mine.stop or not len(some):
                continue
            of_mine = take(excluded, np.arange(mine.start, mine.stop))
            block = np.concatenate([vectors[one] for one in here])
            found = nearest_of(query[mine], own[mine], of_mine, References(some, block), job.k)
            if len(references) > 1:
                found = merge(Found(best.other[mine], best.score[mine]), found)
            best.other[mine], best.score[mine] = found.other, found.score
    back = np.argsort(rows)
    finds = np.concatenate([best.other[back], best.score[back].view(np.int32)], axis=1)
    job.run.write(_run(job, "finds", number), finds.tobytes())


def write_group(job: Job, start: int, parts: list[tuple[Int32, Part]]) -> None:
    """A task, the only one that writes these Zarr shards: rows from ``start``; ``parts``: places and their finds."""
    pair_place = job.open().pairs.place
    made = []
    for places, part in parts:
        numbers = _read(job, "finds", part, 2 * job.k).view(np.int32)
        found = Found(numbers[:, : job.k], numbers[:, job.k :].copy().view(np.float32))
        made.append(of_places(np.searchsorted(places, pair_place[part.rows]), found, len(places)))
    other = np.concatenate([part.other for part in made])
    job.writer().write(start, other, np.concatenate([part.score for part in made]))


def _run(job: Job, kind: str, number: int) -> str:
    return scratch_object(job.graph, kind, number)


def _read(job: Job, kind: str, part: Part, columns: int) -> Float32:
    """The rows (n, columns) of four bytes each, in the order of the part's spans."""

    def read(span: tuple[int, int, int]) -> bytes:
        run, first, last = span
        return job.run.read_range(_run(job, kind, run), 4 * columns * first, 4 * columns * (last - first))

    with ThreadPoolExecutor(8) as threads:
        data = b"".join(threads.map(read, part.spans))
    return np.frombuffer(data, dtype=np.float32).reshape(-1, columns)


class Approximate:
    """One approximate search, led by the client: :meth:`prepare`, and if that finds it worthwhile :meth:`search`."""

    def __init__(self, client: Any, job: Job, embeddings: Embeddings, excluded: Csr) -> None:
        self._client, self._job, self._embeddings, self._excluded = client, job, embeddings, excluded

    def _submit(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return self._client.submit(work, *arguments, pure=False)

    def prepare(self, wanted: float) -> dict[str, Any]:
        """Sort all vectors into lists, and measure. What the graph says of its search: ``mode`` is "approximate"
        where it is worthwhile, else "exact", and ``because`` says why."""
        job, embeddings, rng = self._job, self._embeddings, np.random.default_rng(0)
        place = embeddings.pairs.place
        training = np.flatnonzero(np.isin(embeddings.reference_place, place))
        count = n_lists(len(training))
        sample = np.sort(rng.choice(training, min(len(training), count * TRAINED_ON), replace=False))
        centroids = self._submit(centroids_of, self._pick("reference", sample), count)
        rows = np.sort(rng.choice(len(place), min(len(place), SAMPLE), replace=False))
        queries, blocks = self._pick("query", rows), reference_blocks(len(embeddings.reference_place))
        of_sample = (place[rows], tuple(take(self._excluded, place[rows])))
        truth = fold(
            [self._submit(top_of_sample, job, queries, *of_sample, *block) for block in blocks],
            lambda one, two: self._submit(merge, one, two),
        )
        starts, futures = [], []
        query_blocks = reference_blocks(len(place))
        claim_scratch(job.run, job.graph, query=len(query_blocks), reference=len(blocks))
        for kind, of_kind in (("query", query_blocks), ("reference", blocks)):
            starts.append([start for start, _ in of_kind])
            futures.append(
                [self._submit(sort_block, job, kind, number, *at, centroids) for number, at in enumerate(of_kind)]
            )
        both = [*futures[0], *futures[1]]
        for _ in track(results(both), "inverted lists", len(both)):
            pass
        self._queries, self._references = (
            Runs(self._client.gather(of_kind), first, count) for of_kind, first in zip(futures, starts, strict=True)
        )
        self._near = nearness(centroids.result())
        true = truth.result().other
        at = np.searchsorted(embeddings.reference_place, np.maximum(true, 0))
        found_in = np.where(true >= 0, self._references.lists[at], -1).astype(np.int32)
        self._probes, recall = width(self._near, self._queries.lists[rows], found_in, wanted)
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
        """Futures of the vectors with these numbers, sorted."""
        picked = []
        for start, stop in reference_blocks(getattr(self._embeddings, kind).shape[0]):
            here = rows[slice(*np.searchsorted(rows, [start, stop]))]
            if len(here):
                picked.append(self._submit(sampled, self._job, kind, start, stop, here))
        return picked

    def search(self) -> list[Any]:
        """Search, and then submit the tasks that write the graph, which are returned."""
        near = self._near[:, : self._probes]
        searches: list[Any] = []
        found: list[Int64] = []
        parts = cut(self._queries.sizes, QUERIES)
        claim_scratch(self._job.run, self._job.graph, finds=len(parts))
        for lists in parts:
            lists = lists[self._queries.sizes[lists] > 0]
            if not len(lists):
                continue
            queries, wanted = self._queries.part(lists), np.unique(near[lists])
            references = [self._references.part(wanted[some]) for some in cut(self._references.sizes[wanted], BLOCK)]
            excluded = tuple(take(self._excluded, self._embeddings.pairs.place[queries.rows]))
            searches.append(
                self._submit(search_lists, self._job, len(searches), queries, references, near[lists], excluded)
            )
            found.append(np.sort(queries.rows))
        for _ in track(results(searches), "neighbours", len(searches)):
            pass
        return self._write(found)

    def _write(self, found: list[Int64]) -> list[Any]:
        """``found``: the queries of each task that searched, sorted."""
        places, pair_place = np.unique(self._embeddings.pairs.place), self._embeddings.pairs.place
        writes = []
        for start, stop in groups(len(places), len(pair_place)):
            parts = []
            for piece in pieces(places[start:stop], pair_place, self._excluded, QUERIES):
                ranges = [np.searchsorted(rows, [piece.first, piece.last]).tolist() for rows in found]
                spans = [(number, first, last) for number, (first, last) in enumerate(ranges) if first < last]
                rows = np.concatenate([found[number][first:last] for number, first, last in spans])
                parts.append((piece.places, Part(spans, rows, np.zeros(0, dtype=np.int32))))
            writes.append(self._submit(write_group, self._job, start, parts))
        return writes
