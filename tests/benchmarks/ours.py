"""Run geostream's contestants, and the limits: what fetching alone and decoding alone can do on this machine.

``whole_shards`` fetches every shard in one GET, four at a time, and looks at nothing; ``decode_only`` decodes JPEGs
that lie in the page cache as the loader does, with as many threads as the others have workers. On few cores the two
together are slower than either, and the S3 server needs a share, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import obstore
import simplejpeg
import torch
from obstore.store import S3Store

from geostream.layout import Layout, open_layout
from geostream.layout.members import MemberTable
from geostream.planning.plan import EpochPlan, load_plan
from geostream.store import Store
from geostream.streaming.dataset import plan_dataset
from geostream.streaming.fetch import Fetcher
from geostream.streaming.loader import Loader
from geostream.streaming.pipeline import ImageSizes
from tests.benchmarks.job import Delivered, Job
from tests.benchmarks.pairs import Pairs

DATASET = "bench"
FETCHES = 4  # whole shards under way at once


def s3_store(url: str) -> S3Store:
    """obstore's client for ``s3://bucket/prefix``, from the AWS_* variables."""
    parts = urlsplit(url)
    return S3Store(parts.netloc, prefix=parts.path.strip("/"), client_options={"allow_http": True})


def open_plan(job: Job, layout: str) -> tuple[Layout, EpochPlan]:
    """The layout of that name and its plan: opening them is part of what is timed."""
    store = Store.open(job.url)
    opened = open_layout(store, DATASET, layout)
    return opened, load_plan(store.child("runs", layout), 0, opened)


def whole_shards(job: Job) -> Iterator[Delivered]:
    layout = open_layout(Store.open(job.url), DATASET, "clustered")
    store = s3_store(layout.store.url)
    pairs = np.bincount(layout.shard_of_place)

    def fetch(shard: int) -> None:
        obstore.get(store, layout.shard_names[shard]).bytes()

    with ThreadPoolExecutor(FETCHES) as pool:
        for shard, _ in enumerate(pool.map(fetch, range(len(pairs)))):
            yield Delivered(int(pairs[shard]))


def decode_only(job: Job) -> Iterator[Delivered]:
    pairs = Pairs(job.folder)

    def decode(task: tuple[bytes, Any]) -> None:
        data, pixels = task
        simplejpeg.decode_jpeg(data, "RGB", buffer=pixels)

    with ThreadPoolExecutor(job.workers) as pool:
        for start in range(0, len(pairs), job.batch_size):
            batch = [pairs[number] for number in range(start, min(start + job.batch_size, len(pairs)))]
            tile, view = (np.empty((len(batch), *size, 3), dtype=np.uint8) for size in (job.tile, job.view))
            tasks = [task for (t, v), to, vo in zip(batch, tile, view, strict=True) for task in ((t, to), (v, vo))]
            for _ in pool.map(decode, tasks):
                pass
            yield Delivered(len(batch), *(torch.from_numpy(a).permute(0, 3, 1, 2) for a in (tile, view)))


def geostream(job: Job) -> Iterator[Delivered]:
    """Threads of this process decode, as many as the others have workers."""
    return _stream(job, threads=job.workers)


def geostream_unclustered(job: Job) -> Iterator[Delivered]:
    return _stream(job, layout="random", threads=job.workers)


def geostream_transport(job: Job) -> Iterator[Delivered]:
    """What the plan's batches need, as bytes with their checksums compared, without decoding."""
    opened, plan = open_plan(job, "clustered")
    members = MemberTable.of(opened)
    tiles = members.rows(plan.place.ravel()).reshape(plan.place.shape)
    views = members.rows(plan.place.ravel(), plan.view.ravel()).reshape(plan.place.shape)
    with Fetcher(members, list(np.concatenate([tiles, views], axis=1)), lanes=plan.lanes) as fetcher:
        for step, _ in enumerate(fetcher):
            yield Delivered(len(plan.place[step]))


def geostream_workers(job: Job) -> Iterator[Delivered]:
    """Loader processes with one decoding thread each."""
    return _stream(job, workers=job.workers, threads=1)


def _stream(job: Job, *, threads: int, layout: str = "clustered", workers: int = 0) -> Iterator[Delivered]:
    opened, plan = open_plan(job, layout)
    dataset = plan_dataset(opened, plan, ImageSizes(tile=job.tile, view=job.view))
    loader = Loader(dataset, workers=workers, threads=threads)
    with loader:
        for batch in loader:
            tensors = batch.tensors
            yield Delivered(len(tensors["pair"]), tensors.get("tile"), tensors.get("view"))
