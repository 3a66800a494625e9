"""Define what reading may cost: memory, look-ahead, bytes read in vain, and pairs replaced.

The defaults, in batches of each lane: a look-ahead of 128 batches merges a patchwork plan's reads into whole shards,
and a prefetch of 8 hides the time that a shard takes to arrive. In the time of one request, a fast store could send
about 1 MiB, so smaller gaps are read through.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from geostream.settings import TrainSettings


@dataclass(frozen=True)
class ReadOptions:
    """What one reader may cost."""

    look_ahead: int = 128  # batches whose needs are merged into one read
    prefetch: int = 8  # batches that a read may start before its need
    budget_bytes: int = 2 * 2**30  # most bytes of shards held at once
    gap_bytes: int = 2**20  # unneeded bytes that are read through rather than skipped by another request
    replaced_limit: float = 0.01  # share of the epoch's pairs that may be replaced; one pair always may

    @classmethod
    def of(cls, settings: TrainSettings) -> ReadOptions:
        """Return the options that a run's settings ask for."""
        return cls(
            look_ahead=settings.read.look_ahead,
            prefetch=settings.read.prefetch,
            budget_bytes=settings.read.buffer_mib * 2**20,
            gap_bytes=settings.read.gap_kib * 2**10,
            replaced_limit=settings.read.replaced_limit,
        )

    def share(self, readers: int) -> ReadOptions:
        """Return the options of one of several readers, which share the budget."""
        return replace(self, budget_bytes=self.budget_bytes // readers)
