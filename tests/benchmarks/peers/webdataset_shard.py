"""The loop that webdataset's documentation has: a ShardWriter to which samples are written; one a process.

Each of the processes (forked: the quickest start there is) has its share of the places and its own shards of 128 MiB.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import webdataset as wds

from tests.benchmarks.peers.pillow_shard import stored
from tests.benchmarks.shard_run import SHARD_BYTES, Job


def write(job: Job) -> None:
    Path(job.out).mkdir()
    if job.workers == 1:
        _write_share(job, 0)
        return
    context = get_context("fork")
    processes = [context.Process(target=_write_share, args=(job, number)) for number in range(job.workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process ended with {process.exitcode}")


def _write_share(job: Job, number: int) -> None:
    places = job.listed()
    share = range(number * len(places) // job.workers, (number + 1) * len(places) // job.workers)
    pattern = f"{job.out}/{number:02d}-%05d.tar"
    with wds.ShardWriter(pattern, maxsize=SHARD_BYTES, verbose=0) as writer:
        for row in share:
            tile, *views = places[row]
            sample = {"__key__": f"{row:06d}", "tile.jpg": stored(Path(job.raw), tile)}
            sample |= {f"view-{at:02d}.jpg": stored(Path(job.raw), view) for at, view in enumerate(views)}
            writer.write(sample | {"json": [image.path for image in places[row]]})


def read(job: Job) -> Iterator[tuple[str, bytes]]:
    tars = [str(path) for path in sorted(Path(job.out).glob("*.tar"))]
    for sample in wds.WebDataset(tars, shardshuffle=False):
        images = [sample["tile.jpg"], *(sample[name] for name in sorted(sample) if name.startswith("view-"))]
        yield from zip(json.loads(sample["json"]), images, strict=True)
