"""Retrieval metrics as the field computes them, with ties counted against the model.

Decides what a tie is: similarities are computed in float64 from float32 embeddings, and whatever is not smaller than
the true tile's by more than rounding ranks before it. So a constant embedding scores zero rather than 100 %, and NaN
never wins. Blocks of queries bound the memory: 256 MB of similarities at a time, whatever the gallery. float64 costs
twice the time of float32; on 100,000 × 100,000 it is minutes on a CPU.

Source: the metrics of VIGOR (Zhu et al., CVPR 2021, section 5) and of Sample4Geo's evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geostream.errors import BadInput
from geostream.layout import Csr, Int32, Int64, Layout, Pairs

TIE = 1e-12  # far above float64's rounding of a unit dot product, far below any real difference of float32 vectors
BLOCK = 2**25  # similarities held at once

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Evaluation:
    """Shares of queries, 0…1, and how many queries and gallery tiles they are over."""

    r1: float
    r5: float
    r10: float
    r1pct: float
    hit_rate: float
    gallery: int
    queries: int


def rank(query: Float32, reference: Float32, truth: Int64, allowed: Csr | None = None) -> tuple[Int64, Int64]:
    """How many gallery tiles stand before the true one, for each query: (of all, of all but the allowed ones).

    query (Q, D), reference (R, D): embeddings; truth (Q,): row of the true tile; allowed: Q ragged rows of gallery rows
    (semi-positives) that may stand before the truth. Both results (Q,) are 0 where the truth comes first, alone.
    """
    gallery = reference.astype(np.float64).T
    all_rivals, real_rivals = np.empty(len(query), dtype=np.int64), np.empty(len(query), dtype=np.int64)
    step = max(1, BLOCK // max(len(reference), 1))
    for start in range(0, len(query), step):
        block = slice(start, min(start + step, len(query)))
        similarity = query[block].astype(np.float64) @ gallery
        rows = np.arange(len(similarity))
        true = similarity[rows, truth[block]][:, None]
        rival = ~(similarity < true - TIE)  # not ">=": NaN must count against the model
        rival[rows, truth[block]] = False
        all_rivals[block] = rival.sum(axis=1)
        if allowed is not None:
            bounds = allowed.indptr[block.start : block.stop + 1]
            rival[np.repeat(rows, np.diff(bounds)), allowed.indices[bounds[0] : bounds[-1]]] = False
        real_rivals[block] = rival.sum(axis=1)
    return all_rivals, real_rivals


def score(query: Float32, reference: Float32, truth: Int64, allowed: Csr | None = None) -> Evaluation:
    """The metrics over all queries; arguments as of :func:`rank`.

    R@k: share of queries with fewer than k tiles before the truth. R@1 %: k = gallery // 100, at least 1. Hit rate:
    nothing but allowed tiles before the truth; equals R@1 where nothing is allowed.
    """
    if not len(query) or not len(reference):
        raise BadInput("nothing to evaluate: there are no queries, or the gallery is empty")
    before, real_before = rank(query, reference, truth, allowed)

    def recall(k: int) -> float:
        return float((before < k).mean())

    return Evaluation(
        r1=recall(1),
        r5=recall(5),
        r10=recall(10),
        r1pct=recall(max(1, len(reference) // 100)),
        hit_rate=float((real_before == 0).mean()),
        gallery=len(reference),
        queries=len(query),
    )


def evaluate(
    layout: Layout, split: str, query: Float32, reference: Float32, pairs: Pairs, reference_place: Int32
) -> Evaluation:
    """The metrics of a split: query rows are ``pairs``, reference rows are the places ``reference_place``.

    Raises BadInput where a query's true tile is missing from the gallery, or the pairs are not the split's.
    """
    if not np.array_equal(pairs.place, layout.pairs(split).place) or len(query) != len(pairs.place):
        raise BadInput(f"the embeddings' queries are not the {split} pairs of layout {layout.name}; embed again")
    row = np.full(layout.n_places, -1, dtype=np.int64)
    row[reference_place] = np.arange(len(reference_place))
    truth = row[pairs.place]
    if (truth < 0).any():
        key = layout.keys[int(pairs.place[truth < 0][0])]
        raise BadInput(f"layout {layout.name}: the true tile of {key} is not in the gallery of split {split}")
    return score(query, reference, truth, _gallery_rows(layout.semi_positives(split), row))


def _gallery_rows(places: Csr, row: Int64) -> Csr:
    """The ragged place ids as gallery rows; places outside of the gallery fall away."""
    rows = row[places.indices]
    kept_before = np.concatenate([[0], np.cumsum(rows >= 0)])
    return Csr(kept_before[places.indptr].astype(np.int64), rows[rows >= 0].astype(np.int32))
