"""Taking members out of a range as its bytes come, however they are cut and wherever they break off."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.layout.members import Extents
from geostream.streaming.transport import Incoming


@settings(deadline=None, max_examples=300)
@given(
    seed=st.integers(0, 2**32),
    members=st.integers(1, 12),
    cuts=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    breaks=st.sets(st.integers(0, 60)),
)
def test_members_come_whole_however_the_bytes_are_cut(
    seed: int, members: int, cuts: list[int], breaks: set[int]
) -> None:
    rng = np.random.default_rng(seed)
    size, gap = rng.integers(0, 40, members), rng.integers(0, 20, members)
    offset = np.cumsum(gap) + np.concatenate([[0], np.cumsum(size[:-1])])
    shard = rng.bytes(int(offset[-1] + size[-1]))
    rows = list(range(members))
    incoming = Incoming(
        int(offset[0]), len(shard) - int(offset[0]), rows, Extents(np.zeros(members, np.int64), offset, size)
    )
    fetched = answers = 0
    start, wanted = incoming.missing()
    while answers == 0 or wanted:
        answers += 1
        at = start
        for number, cut in enumerate(cuts * (1 + wanted)):
            chunk = memoryview(shard)[at : min(at + cut, start + wanted)]
            if not len(chunk) and wanted:
                break
            incoming.take(chunk)
            at += len(chunk)
            fetched += len(chunk)
            if number in breaks and answers < 50:  # this answer breaks off here
                break
        start, wanted = incoming.missing()
    assert incoming.taken == {row: shard[offset[row] : offset[row] + size[row]] for row in rows}
    assert list(incoming.taken) == rows
    # What is fetched again is at most the beginning of one member an answer.
    assert fetched <= len(shard) - offset[0] + (answers - 1) * int(size.max())
