"""Taking members out of a range as its bytes come, however they are cut; leaving a transport that others still use."""

from __future__ import annotations

import gc
import logging
import threading
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.layout.members import Extents, MemberTable
from geostream.store import Store
from geostream.streaming.stats import StreamStats
from geostream.streaming.transport import Incoming, Transport
from tests.helpers import tiny_layout


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


def test_nothing_is_pending_where_another_thread_goes_on_reading(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As at a program's end, which leaves what the program has left open."""
    members = MemberTable.of(tiny_layout(Store.open(tmp_path), places=4))
    rows = np.array([0])
    shard, offset, size = (int(one[0]) for one in members.extents.of(rows))
    refused = []

    def read_on(transport: Transport, begun: threading.Event) -> None:
        try:
            while True:
                transport.read(shard, offset, size, rows)
                begun.set()
        except CancelledError:
            refused.append(transport)

    with caplog.at_level(logging.ERROR, "asyncio"):
        for _ in range(4):
            with Transport(members, StreamStats(budget_bytes=2**20)) as transport:
                begun = threading.Event()
                thread = threading.Thread(target=read_on, args=(transport, begun))
                thread.start()
                begun.wait(10)
            thread.join(10)
        gc.collect()
    assert len(refused) == 4 and not caplog.records
