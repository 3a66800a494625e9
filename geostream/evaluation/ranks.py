"""How many wrong candidates stand before a right one: counted in blocks, exactly, ties against the model.

Decides what a tie is: embeddings are float32 numbers, and two similarities are equal where their exact values are. A
matrix product in float64 tells all pairs apart but those nearer than its rounding; these few are summed again without
any. So the order of a gallery, the size of the blocks and the BLAS change nothing, a constant embedding scores about
zero instead of 100 %, and a copy of the right tile counts against the model wherever it stands. What is no finite
number is never found and always in the way. float64 costs twice the time of float32; that a pair is summed again costs
some 0.1 ms, which only embeddings of very few different values feel.

No more than STRIP similarities are held at a time, whatever the number of queries and candidates.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from geostream.arrays import Bools, Csr, Float32, Float64, Int32, Int64, take

STRIP = 2**21  # similarities held at once: 16 MiB
NEVER = 2**40  # "candidates" before a right one that is no number: more than any rank looks at
ROUNDING = 2.0**-52  # of float64: twice what one operation is off by, relatively


class Before(NamedTuple):
    """Wrong candidates before each right answer, one number an answer: (E,) of all, (E,) of all but the allowed."""

    every: Int64
    barred: Int64


class _Answers(NamedTuple):
    """The right answers of some queries, flat: E of them."""

    owner: Int64  # (E,) row of the query
    query: Float32  # (n, D)
    vector: Float32  # (E, D)
    similarity: Float64  # (E,)
    reach: Float64  # (E,) length of the query: times a vector's, what rounding is relative to
    length: Float64  # (E,) of the answer
    hopeless: Bools  # (E,) nothing can stand behind it


def count_before(
    query: Float32, right: Float32, truths: Csr, allowed: Csr, gallery: Iterable[tuple[int, Float32]]
) -> Before:
    """How many candidates of the gallery are not less similar to their query than a right one is.

    ``query`` (n, D); ``truths``: n lists of gallery rows, each row once, none empty; ``right`` (E, D): the vectors of
    ``truths.indices``; ``allowed``: n lists of rows that ``barred`` leaves out. ``gallery``: (first row, vectors) of
    consecutive blocks, each held while it is compared. Vectors of any float type, taken as float32.
    """
    answers = _answers(query, right, truths)
    every, freed = np.zeros((2, len(answers.owner)), dtype=np.int64)
    free = _flat(take(allowed, answers.owner))
    for first, vectors in gallery:
        block = _Block(first, np.asarray(vectors, dtype=np.float32))
        here = free[(free[:, 1] >= first) & (free[:, 1] < first + len(vectors))]
        height = max(1, STRIP // max(len(vectors), 1))
        for top in range(0, len(query), height):
            rows = slice(top, min(top + height, len(query)))
            similarity = block.similarity(answers.query[rows])
            of_rows = slice(*truths.indptr[[rows.start, rows.stop]].tolist())
            _strike(similarity, answers.owner[of_rows] - top, truths.indices[of_rows] - first)
            for start in range(of_rows.start, of_rows.stop, height):
                some = slice(start, min(start + height, of_rows.stop))
                rival = _rivals(similarity, answers, some, top, block)
                every[some] += np.count_nonzero(rival, axis=1)
                of_some = here[slice(*np.searchsorted(here[:, 0], [some.start, some.stop]).tolist())]
                is_rival = rival[of_some[:, 0] - some.start, of_some[:, 1] - first]
                freed += np.bincount(of_some[is_rival, 0], minlength=len(freed))
    never = ~np.isfinite(answers.similarity)
    every[never], freed[never] = NEVER, 0
    return Before(every, every - freed)


def _answers(query: Float32, right: Float32, truths: Csr) -> _Answers:
    query, right = (np.asarray(vectors, dtype=np.float32) for vectors in (query, right))
    owner = np.repeat(np.arange(len(query)), np.diff(truths.indptr))
    reach, length = (_lengths(vectors) for vectors in (query, right))
    similarity = np.empty(len(owner))
    for start in range(0, len(owner), 1024):
        some = slice(start, start + 1024)
        similarity[some] = np.einsum("ed,ed->e", _finite(query[owner[some]]), _finite(right[some]))
    unknown = ~np.isfinite(reach[owner]) | ~np.isfinite(length)
    similarity[unknown] = np.nan
    # A query of zeros is equally similar to all: no need to look at each pair.
    hopeless = unknown | (reach[owner] == 0)
    reach, length = np.where(hopeless, 0, reach[owner]), np.where(hopeless, 0, length)
    return _Answers(owner, query, right, similarity, reach, length, hopeless)


class _Block:
    """Candidates in a row of the gallery, ready to be compared."""

    def __init__(self, first: int, vectors: Float32) -> None:
        self.first, self.vectors = first, vectors
        lengths = _lengths(vectors)
        self.unknown = np.flatnonzero(~np.isfinite(lengths))
        self.longest = float(lengths[np.isfinite(lengths)].max(initial=0))
        self._wide = _finite(vectors)
        self._digests: npt.NDArray[np.uint64] | None = None

    def similarity(self, query: Float32) -> Float64:
        """(n, R): what is no number is infinitely similar, so that it is in the way."""
        product: Float64 = _finite(query) @ self._wide.T
        product[:, self.unknown] = np.inf
        return product

    @property
    def digests(self) -> npt.NDArray[np.uint64]:
        """(R,) equal for equal vectors; made when the first pair asks for them."""
        if self._digests is None:
            self._digests = digests(self.vectors)
        return self._digests


def _strike(similarity: Float64, row: Int64, column: Int32) -> None:
    """Right answers are nobody's rivals: out of the strip's columns with those that lie in it."""
    inside = (column >= 0) & (column < similarity.shape[1])
    similarity[row[inside], column[inside]] = -np.inf


def _rivals(similarity: Float64, answers: _Answers, some: slice, top: int, block: _Block) -> Bools:
    """(e, R): which candidates are no less similar than the right answers ``some``; ``similarity`` from row ``top``."""
    rows = answers.owner[some] - top
    if not np.array_equal(rows, np.arange(len(similarity))):
        similarity = similarity[rows]
    terms = (answers.query.shape[1] + 8) * ROUNDING
    doubt = terms * answers.reach[some] * (answers.length[some] + block.longest)
    low, high = answers.similarity[some] - doubt, answers.similarity[some] + doubt
    low[answers.hopeless[some]] = high[answers.hopeless[some]] = np.finfo(np.float64).min  # all but what was struck
    rival: Bools = similarity > high[:, None]
    open_to_doubt: Bools = similarity >= low[:, None]
    if np.count_nonzero(open_to_doubt) > np.count_nonzero(rival):
        entry, column = np.nonzero(open_to_doubt ^ rival)
        rival[entry, column] = _not_behind(answers, entry + some.start, block, column)
    return rival


def _not_behind(answers: _Answers, entry: Int64, block: _Block, column: Int64) -> Bools:
    """(n,) for pairs in doubt: whether the candidate ``column`` is at least as similar as the answer ``entry``."""
    own, which = np.unique(entry, return_inverse=True)
    equal: Bools = digests(answers.vector[own])[which] == block.digests[column]
    for pair in np.flatnonzero(~equal):
        query = answers.query[answers.owner[entry[pair]]]
        equal[pair] = at_least_as_similar(query, block.vectors[column[pair]], answers.vector[entry[pair]])
    return equal


def at_least_as_similar(query: Float32, one: Float32, other: Float32) -> bool:
    """Whether query · one ≥ query · other, (D,) finite float32 each, without rounding.

    A product of two float32 is a float64 exactly, and ``math.fsum`` rounds only its result.
    """
    differ = one != other
    wide = query[differ].astype(np.float64)
    return math.fsum([*(wide * one[differ]).tolist(), *(wide * -other[differ]).tolist()]) >= 0


def digests(vectors: Float32) -> npt.NDArray[np.uint64]:
    """(n,) hashes of the rows' bytes."""
    rows = np.ascontiguousarray(vectors)
    made = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    return np.frombuffer(made, dtype=np.uint64)


def _finite(vectors: Float32) -> Float64:
    """As float64, with zeros in rows that are no finite numbers throughout."""
    wide = vectors.astype(np.float64)
    wide[~np.isfinite(vectors).all(axis=1)] = 0
    return wide


def _lengths(vectors: Float32) -> Float64:
    """(n,) Euclidean lengths; not finite where a row is not."""
    with np.errstate(invalid="ignore"):
        lengths: Float64 = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    return lengths


def _flat(lists: Csr) -> Int64:
    """(m, 2) distinct (list, member) of ragged lists, sorted."""
    owner = np.repeat(np.arange(len(lists.indptr) - 1), np.diff(lists.indptr))
    return np.unique(np.stack([owner, lists.indices.astype(np.int64)], axis=1), axis=0)
