"""Schedule: from a plan's batches to the reads they need, when each must be there, and when it can go.

A pure function, apart from all I/O; the executor next to it (``fetch``) only does what it says. The unit of reading
here is the whole shard: one large sequential request each, nothing fetched twice. That is cheap for a plan that walks
its shards in order and honest for one that does not: a shard is held from its first use to its last, so a plan that
jumps about holds nearly everything, and ``resident_share`` says so before the first read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from geostream.errors import BadInput
from geostream.layout import Int64

GIB = 2**30


@dataclass(frozen=True)
class Schedule:
    """R reads in order of need. A step is a batch, in the plan's global order."""

    shard: Int64  # (R,) what to read
    size: Int64  # (R,) its bytes
    come: Int64  # (R,) step at which the read may start, so that it has arrived by ``first``
    first: Int64  # (R,) first step that uses it
    last: Int64  # (R,) last step that uses it: let it go after that step
    peak_bytes: int  # most bytes held at once, those arriving included
    all_bytes: int  # of every shard that is read: what random access would hold
    bytes_used: int  # of the members that the batches need, each counted once

    @property
    def bytes_fetched(self) -> int:
        return int(self.size.sum())

    @property
    def requests(self) -> int:
        return len(self.shard)

    @property
    def resident_share(self) -> float:
        """Peak bytes held over the bytes of all shards that the plan reads."""
        return self.peak_bytes / self.all_bytes if self.all_bytes else 0.0

    @property
    def amplification(self) -> float:
        """Bytes fetched over bytes used."""
        return self.bytes_fetched / self.bytes_used if self.bytes_used else 0.0

    @property
    def requests_per_gib(self) -> float:
        return self.requests * GIB / self.bytes_fetched if self.bytes_fetched else 0.0


def schedule(
    batches: Sequence[Int64],
    member_shard: npt.NDArray[np.integer],
    shard_sizes: npt.NDArray[np.integer],
    member_sizes: npt.NDArray[np.integer],
    *,
    ahead: int = 0,
) -> Schedule:
    """Reads and evictions for batches in the order in which they are needed.

    ``batches``: rows of the members that each batch needs; ``member_shard`` and ``member_sizes`` (M,): their shards and
    bytes; ``shard_sizes`` (S,) bytes. ``ahead``: reads that may be under way before they are needed.
    Raises BadInput where batches and index contradict one another.
    """
    members = np.concatenate([np.zeros(0, dtype=np.int64), *batches])
    step = np.repeat(np.arange(len(batches)), [len(batch) for batch in batches])
    used = np.unique(members)
    if len(used) and not 0 <= used[0] <= used[-1] < len(member_shard):
        raise BadInput("the plan names members that the layout's index does not hold; plan anew from this layout")
    shards = member_shard[used]
    if len(shards) and not 0 <= shards.min() <= shards.max() < len(shard_sizes):
        raise BadInput("the layout's index names shards that the layout does not have; shard the dataset again")
    first = np.full(len(shard_sizes), len(batches), dtype=np.int64)
    last = np.full(len(shard_sizes), -1, dtype=np.int64)
    np.minimum.at(first, member_shard[members], step)
    np.maximum.at(last, member_shard[members], step)
    read = np.flatnonzero(last >= 0)
    read = read[np.lexsort((read, first[read]))]
    first, last, size = first[read], last[read], shard_sizes[read].astype(np.int64)
    # A read starts when the read ``ahead`` places before it is needed, the first ones at once.
    come = np.concatenate([np.zeros(min(ahead, len(read)), dtype=np.int64), first[: max(len(read) - ahead, 0)]])
    # Bytes held during each step: those that have come, less those let go after an earlier step.
    change = np.zeros(len(batches) + 1, dtype=np.int64)
    np.add.at(change, come, size)
    np.subtract.at(change, last + 1, size)
    return Schedule(
        shard=read.astype(np.int64),
        size=size,
        come=come,
        first=first,
        last=last,
        peak_bytes=int(np.cumsum(change).max(initial=0)),
        all_bytes=int(size.sum()),
        bytes_used=int(member_sizes[used].sum()),
    )
