"""Read as Sample4Geo would on object storage: the same hard batches, one range GET an image, by a pool of threads.

Sample4Geo reads image files in the order of its batches; here each file is a range of a shard. Two batches are asked
for ahead, as a loader would. Nothing is decoded, which is in its favour.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import obstore

from geostream.layout.members import MemberTable
from tests.benchmarks.job import Delivered, Job
from tests.benchmarks.ours import open_plan, s3_store

THREADS = 16
AHEAD = 2


def read(job: Job) -> Iterator[Delivered]:
    """Fetch the bytes of the plan's batches, in their order."""
    layout, plan = open_plan(job, "clustered")
    store = s3_store(layout.store.url)
    members = MemberTable.of(layout)
    tile, view = (
        members.rows(plan.place.ravel(), number).reshape(plan.place.shape) for number in (None, plan.view.ravel())
    )

    def fetch(row: int) -> int:
        shard, offset, size = (int(column[row]) for column in members.extents)
        return len(obstore.get_range(store, layout.shard_names[shard], start=offset, length=size))

    def hand_over(asked: list[Future[int]]) -> Delivered:
        return Delivered(len([one.result() for one in asked]) // 2)

    under_way: deque[list[Future[int]]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        for rows in np.concatenate([tile, view], axis=1).tolist():
            under_way.append([pool.submit(fetch, row) for row in rows])
            if len(under_way) > AHEAD:
                yield hand_over(under_way.popleft())
        while under_way:
            yield hand_over(under_way.popleft())
