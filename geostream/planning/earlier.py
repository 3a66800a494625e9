"""Compare the batches of an epoch with those of earlier plans.

Both functions go through a plan by blocks of batches, so that memory holds little beside what is given and returned: 8
bytes a pair while pairs are looked up.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from geostream.arrays import Int32, Int64, Pairs, pair_codes
from geostream.planning.plan import EpochPlan

BLOCK = 1024  # batches at a time


def batches_of_pairs(pairs: Pairs, previous: Iterable[EpochPlan]) -> tuple[Int32, ...]:
    """Look up in which batch of earlier plans each pair was.

    Args:
        pairs: The P pairs that are planned.
        previous: Earlier plans, of any layout: place ids are the same in all generations. Each is dropped before the
            next is taken.

    Returns:
        For each plan (P,) the number of the batch that held each pair, -1 if none did.
    """
    code: Int64 | None = None
    history = []
    for plan in previous:
        code = pair_codes(*pairs) if code is None else code
        batch = np.full(len(code), -1, dtype=np.int32)
        for start in range(0, plan.n_batches, BLOCK):
            before = pair_codes(plan.place[start : start + BLOCK], plan.view[start : start + BLOCK])
            order = np.argsort(before, axis=None)  # looking up sorted codes takes a third of the time
            sought = before.ravel()[order]
            row = np.minimum(np.searchsorted(code, sought), len(code) - 1)
            known = code[row] == sought
            batch[row[known]] = start + order[known] // plan.batch_size
        history.append(batch)
    return tuple(history)


def overlap(batches: Int32, previous: Int32) -> float:
    """Return how much a plan repeats the previous one.

    This is the mean over batches of the largest share of a batch that was in a single batch of the previous plan.

    Args:
        batches: (B, batch size) pair ids.
        previous: (P,) number of each pair's batch in the previous plan, -1 where it was left out.
    """
    size = batches.shape[1]
    largest = np.zeros(len(batches))
    for start in range(0, len(batches), BLOCK):
        before = np.sort(previous[batches[start : start + BLOCK]], axis=1)
        new = np.ones(before.shape, dtype=bool)
        new[:, 1:] = before[:, 1:] != before[:, :-1]
        first = np.flatnonzero(new)  # of equal numbers, as many as there are up to the next
        counts = np.diff(first, append=before.size)
        counts[before.ravel()[first] < 0] = 0  # pairs that the previous plan left out
        largest[start : start + BLOCK] = np.maximum.reduceat(counts, np.flatnonzero(first % size == 0))
    return float(np.mean(largest / size))
