"""What reading may cost: the options of a reader.

Decides the defaults. 128 batches of look-ahead merge whole shards out of a plan that walks them; eight batches of
prefetch hide the time a shard takes to come; 1 MiB is what a request costs a fast store in bytes not read meanwhile;
one pair in a hundred may be replaced before the epoch is given up. Batches are counted in each lane.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from geostream.settings import TrainSettings


@dataclass(frozen=True)
class ReadOptions:
    """What one reader may spend."""

    look_ahead: int = 128  # batches whose needs are merged into one read
    prefetch: int = 8  # batches that a read may start before its need
    budget_bytes: int = 2 * 2**30  # most bytes of shards held at once
    gap_bytes: int = 2**20  # unneeded bytes that are read through rather than skipped by another request
    replaced_limit: float = 0.01  # share of the epoch's pairs that may be replaced; one pair always may

    @classmethod
    def of(cls, settings: TrainSettings) -> ReadOptions:
        """What a run's settings let a reader spend."""
        return cls(
            look_ahead=settings.read.look_ahead,
            prefetch=settings.read.prefetch,
            budget_bytes=settings.read.buffer_mib * 2**20,
            gap_bytes=settings.read.gap_kib * 2**10,
            replaced_limit=settings.read.replaced_limit,
        )

    def share(self, lanes: int, workers: int) -> ReadOptions:
        """Of one of ``workers`` processes, for a reader that serves ``lanes`` in turn."""
        return replace(
            self,
            look_ahead=self.look_ahead * lanes,
            prefetch=self.prefetch * lanes,
            budget_bytes=self.budget_bytes // workers,
        )
