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

from geostream.arrays import Csr
from geostream.streaming.shared import PlanBatches


@dataclass(frozen=True)
class Substitutes:
    """The substitutes that a plan offers."""

    plan: PlanBatches
    excluded: Csr  # per place, those that may not share a batch with it

    def candidates(self, step: int, batch: Set[int]) -> Iterator[tuple[int, int, int]]:
        """Yield the pairs that may join a batch, best first.

        Args:
            step: Number of the batch in the plan.
            batch: The places that are in the batch now.

        Yields:
            (place, view, pair id).
        """
        for place, view, pair in self._all(step):
            if place not in batch and batch.isdisjoint(self.excluded.row(place).tolist()):
                yield place, view, pair

    def _all(self, step: int) -> Iterator[tuple[int, int, int]]:
        plan = self.plan
        left_out = plan.left_out_place, plan.left_out_view, plan.left_out_pair
        for away in range(len(plan.left_out_pair)):  # each batch begins with another
            place, view, pair = (int(column[(step + away) % len(column)]) for column in left_out)
            yield place, view, pair
        for away in range(len(plan)):
            other = (step + len(plan) // 2 + away) % len(plan)
            if other != step:
                columns = plan.place[other], plan.view[other], plan.pair[other]
                yield from zip(*(column.tolist() for column in columns), strict=True)
