"""Calibrate the threshold of an index on photos whose place is known: views of the test split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from geostream.arrays import Bools, Float32, Int64, listed, take
from geostream.evaluation.embed import Trained
from geostream.evaluation.protocols import searches, view_positions
from geostream.layout import Layout
from geostream.locating.index import tile_points
from geostream.locating.search import TileSearch, flat
from geostream.locating.threshold import SAME_METRES, SEEN, Calibration, calibrate, confidence, elsewhere
from geostream.locating.vectors import picked
from geostream.mining.embeddings import Embeddings, read_rows
from geostream.mining.gps import points_in_metres
from geostream.runs.run import Run
from geostream.runs.stages import embedded

MOST_QUERIES = 5_000  # views that a threshold is calibrated on


@dataclass(frozen=True)
class KnownPhotos:
    """Photos whose place is known: views of the test split.

    Attributes:
        layout: The layout that they are from.
        embeddings: Their vectors and those of the test gallery; None where there is no test split.
        rows: (n,) the pair of each among those of the split.
        vectors: (n, D) their vectors.
    """

    layout: Layout
    embeddings: Embeddings | None
    rows: Int64
    vectors: Float32

    @classmethod
    def of(cls, source: Run, trained: Trained) -> KnownPhotos:
        """Return views of the test split, at most ``MOST_QUERIES``, embedded first if they were not before."""
        layout = source.layout
        if not len(layout.pairs("test")):
            nothing = np.zeros((0, trained.dim), dtype=np.float32)
            return cls(layout, None, np.zeros(0, dtype=np.int64), nothing)
        found = embedded(source, trained, "test")
        _, search = searches(layout, "test", found.pairs, found.reference_place)[0]
        n = len(search.queries)
        rows = np.sort(np.random.default_rng(1).choice(n, min(n, MOST_QUERIES), replace=False))
        return cls(layout, found, rows, picked(found.query, search.queries[rows]))

    def gallery(self) -> TileSearch:
        """Return the search among the tiles of the test gallery."""
        if self.embeddings is None:
            return TileSearch(np.zeros(0, dtype=np.int32), flat(self.vectors))
        return TileSearch(self.embeddings.reference_place, flat(read_rows(self.embeddings.reference)))

    def calibrate(self, search: TileSearch) -> Calibration:
        """Find the threshold of answers from a search among tiles of the same layout."""
        if not len(self.rows):
            return calibrate(np.zeros(0, dtype=np.float32), np.zeros(0, dtype=bool))
        places, scores = search.nearest(self.vectors, SEEN)
        points = tile_points(self.layout)
        right = self._is_own(places[:, 0])
        if points is not None:
            taken = points_in_metres(view_positions(self.layout, "test")[self.rows], self.layout.coordinates)
            right |= np.linalg.norm(points[places[:, 0]] - taken, axis=1) <= SAME_METRES
        return calibrate(confidence(scores, elsewhere(points, places)), right)

    def _is_own(self, best: Int64) -> Bools:
        """Return whether each photo's best place is its own, or a semi-positive."""
        own = self.layout.pairs("test").place[self.rows]
        semi = take(self.layout.semi_positives("test"), self.rows)
        is_own: Bools = (own == best) | listed(semi, np.arange(len(best)), best)
        return is_own
