"""Many epochs in one process: memory, descriptors, threads and processes are as many after the last as after a few.

An epoch must leave nothing behind. Python's objects are counted: one batch kept in each epoch is told. Memory is not
that exact: for tens of epochs the allocator's arenas, one for each thread that there ever was at once, take up to 30 MB
more, and then no more (measured over 100 epochs). The bound is half of the shards that the epochs read.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import threading
import uuid
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from geostream.layout import open_layout
from geostream.store import Store
from geostream.streaming.dataset import plan_dataset
from geostream.streaming.loader import Loader
from geostream.streaming.options import ReadOptions
from geostream.streaming.pipeline import ImageSizes
from infra.s3 import S3Server
from tests.fault_proxy import Kind, fault_proxy
from tests.helpers import tiny_layout
from tests.streaming.plans import hand_made_plan

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at itself through /proc")

ROOT = Path(__file__).parents[2]
SIZES = ImageSizes(tile=(256, 256), view=(128, 512))
BATCH_SIZE = 4
BIT_BY_BIT = ReadOptions(look_ahead=2, prefetch=2)  # so that an epoch left in the middle has reads under way


class Held(NamedTuple):
    """What this process holds."""

    objects: int  # that Python's garbage collector knows
    memory: int
    descriptors: int
    threads: int  # all but obstore's: a pool that lets go of those that were idle for 10 s
    processes: int  # its children


def held() -> Held:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free, but not given back, is no leak
    process = psutil.Process()
    threads = [name for name in map(text_of, Path("/proc/self/task").glob("*/comm")) if not name.startswith("tokio")]
    children = process.children(recursive=True)
    return Held(
        len(gc.get_objects()),
        process.memory_info().rss,
        process.num_fds(),
        len(list(filter(None, threads))),
        len(children),
    )


def text_of(path: Path) -> str:
    """What is in the file; nothing where it is gone."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.fixture(scope="module")
def where(s3: S3Server) -> Store:
    """48 pairs in 8 shards."""
    store = Store.open(f"{s3.url}/{uuid.uuid4().hex}")
    tiny_layout(store, places=48, places_per_shard=6, tile_size=256, view_size=(128, 512))
    return store


def one_epoch(where: Store, number: int, workers: int) -> None:
    """An epoch as a run has it: layout opened, plan, loader. Every fourth is left in the middle."""
    layout = open_layout(Store.open(where.url), "tiny", "g0")
    plan = hand_made_plan(layout, lanes=2, batch_size=BATCH_SIZE, epoch=number)
    until = 3 if number % 4 == 3 else plan.n_batches
    with Loader(plan_dataset(layout, plan, SIZES, options=BIT_BY_BIT), workers=workers, threads=2) as loader:
        seen = torch.cat([batch.tensors["pair"] for batch in islice(loader, until)])
    assert len(torch.unique(seen)) == until * BATCH_SIZE


def soak(where: Store, epochs: int, warm_up: int, workers: int = 0) -> None:
    """In a process of its own: what other tests left in this one goes on making objects."""
    call = f"soak_here(Store.open({where.url!r}), {epochs}, {warm_up}, {workers})"
    program = f"from tests.streaming.test_soak import Store, soak_here; {call}"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def soak_here(where: Store, epochs: int, warm_up: int, workers: int) -> None:
    after = []
    for number in range(epochs):
        one_epoch(where, number, workers)
        after.append(held())
    # What ends with an epoch may take its time, and be there for another or two: the least of a few counts.
    begun, ended = (Held(*map(min, zip(*some, strict=True))) for some in (after[warm_up - 3 : warm_up], after[-5:]))
    assert all(now <= before for now, before in zip(ended[2:], begun[2:], strict=True)), after
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("geostream")]
    assert ended.objects - begun.objects < 2 * (epochs - warm_up), after  # one each is ``after``'s
    shards = open_layout(Store.open(where.url), "tiny", "g0").shard_sizes.sum()
    assert ended.memory - begun.memory < (epochs - warm_up) * shards // 2, after


@pytest.mark.slow
def test_twenty_epochs(where: Store) -> None:
    soak(where, epochs=20, warm_up=5)


@pytest.mark.slow
def test_epochs_of_worker_processes(where: Store) -> None:
    soak(where, epochs=7, warm_up=3, workers=1)


@pytest.mark.slow
def test_many_epochs_on_bad_days(where: Store, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with fault_proxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        kinds: list[Kind] = ["drop", "cut", "short", "status", "delay"]
        for seed, kind in enumerate(kinds):
            proxy.inject(kind, share=0.05, seed=seed)
        proxy.inject("drop", share=0.05, reset=True)
        soak(where, epochs=60, warm_up=20)
        assert len(proxy.met) == 5


@pytest.mark.slow
def test_many_epochs_of_worker_processes(where: Store) -> None:
    soak(where, epochs=40, warm_up=10, workers=2)
