"""Choose a substitute for a pair whose tile or view is damaged, so that its batch stays full and valid.

Candidates are first the pairs that the epoch leaves out, then those of the plan's other batches, beginning half an
epoch away, where a repetition matters least. The first candidate is taken whose place is not in the batch and may share
a batch with all of its places. So the batch keeps its size, and no query meets its own tile as a negative. The cost is
that the damaged pair is not trained in this epoch, and the substitute may be trained twice. The choice depends only on
plan and step, so it is the same whichever process makes the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geostream.arrays import Csr, Int32


@dataclass(frozen=True)
class Substitutes:
    """The substitutes that a plan offers."""

    place: Int32  # (B, batch size) of the plan
    view: npt.NDArray[np.int16]
    left_out_place: Int32
    left_out_view: npt.NDArray[np.int16]
    excluded: Csr  # per place, those that may not share a batch with it

    def candidates(self, step: int, batch: Set[int]) -> Iterator[tuple[int, int]]:
        """Yield the pairs that may join a batch, best first.

        Args:
            step: Number of the batch in the plan.
            batch: The places that are in the batch now.

        Yields:
            (place, view).
        """
        for place, view in self._all(step):
            if place not in batch and batch.isdisjoint(self.excluded.row(place).tolist()):
                yield place, view

    def _all(self, step: int) -> Iterator[tuple[int, int]]:
        turn = step % max(len(self.left_out_place), 1)  # not the same one for every batch
        left_out = list(zip(self.left_out_place.tolist(), self.left_out_view.tolist(), strict=True))
        yield from left_out[turn:] + left_out[:turn]
        for away in range(len(self.place)):
            other = (step + len(self.place) // 2 + away) % len(self.place)
            if other != step:
                yield from zip(self.place[other].tolist(), self.view[other].tolist(), strict=True)
