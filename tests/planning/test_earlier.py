"""Batches are compared with those of earlier plans, block by block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Pairs
from geostream.planning import earlier
from geostream.planning.plan import EpochPlan


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    batches=st.integers(1, 8),
    size=st.integers(1, 6),
    before=st.integers(1, 5),
    block=st.integers(1, 5),
)
def test_overlap_is_its_definition(seed: int, batches: int, size: int, before: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    previous = rng.integers(-1, before, batches * size + 3).astype(np.int32)
    now = rng.permutation(len(previous))[: batches * size].reshape(batches, size).astype(np.int32)
    shares = []
    for batch in now:
        came_from = [number for number in previous[batch].tolist() if number >= 0]
        shares.append(max((came_from.count(number) for number in came_from), default=0) / size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(earlier, "BLOCK", block)
        assert earlier.overlap(now, previous) == pytest.approx(np.mean(shares))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32), block=st.integers(1, 3))
def test_an_earlier_plan_of_other_pairs_is_looked_up(seed: int, block: int) -> None:
    """It may hold pairs that are no more, and lack some."""
    rng = np.random.default_rng(seed)
    there, before = (np.flatnonzero(rng.random(40) < 0.7) for _ in range(2))
    pairs = Pairs((there // 4).astype(np.int32), (there % 4).astype(np.int16))
    mixed = rng.permutation(before)[: len(before) // 3 * 3].reshape(-1, 3)
    place, view = (mixed // 4).astype(np.int32), (mixed % 4).astype(np.int16)
    none = (place.ravel()[:0], view.ravel()[:0])
    plan = EpochPlan("", 1, 0, "random", "random", "", 1, 3, place, view, *none)
    batch_of = {pair: batch for batch, batch_pairs in enumerate(mixed.tolist()) for pair in batch_pairs}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(earlier, "BLOCK", block)
        found = earlier.batches_of_pairs(pairs, iter([plan, plan]))
    assert [one.tolist() for one in found] == [[batch_of.get(pair, -1) for pair in there.tolist()]] * 2
