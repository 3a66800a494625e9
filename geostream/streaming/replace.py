"""The rule by which a pair is replaced whose tile or view stays bad, so that its batch stays full and valid.

Decides who stands in: first the pairs that the epoch leaves out, then those of the plan's other batches, beginning half
an epoch away, where a second sight of the pair weighs least. The first of them stands in whose place is not in the
batch and excludes none of it. So a batch keeps its shape and no query meets its own tile as a negative, at the price
that the stand-in is trained twice in this epoch, and the bad pair not at all. The rule depends on plan and step alone:
whoever makes the batch, the same pair stands in.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geostream.arrays import Csr, Int32


@dataclass(frozen=True)
class Substitutes:
    """The stand-ins of a plan."""

    place: Int32  # (B, batch size) of the plan
    view: npt.NDArray[np.int16]
    left_out_place: Int32
    left_out_view: npt.NDArray[np.int16]
    excluded: Csr  # per place, those that may not share a batch with it

    def candidates(self, step: int, batch: Set[int]) -> Iterator[tuple[int, int]]:
        """(place, view) that may join ``batch``, the places now in the batch of ``step``; best first, each once."""
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
