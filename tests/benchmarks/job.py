"""Run one contestant once, in a process of its own: ``python -m tests.benchmarks.job MODULE FUNCTION JOB.json``.

The clock starts when the contestant is asked for its first batch. So imports do not count, and opening indices,
building datasets and starting workers do. Every batch's tensors are checked for their shape. The result is one line of
JSON on standard output, the last. A peer's process imports none of our packages, and starts nothing before the peer:
what we start (obstore's threads, for one) must not slow a peer down.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

PEERS = "tests.benchmarks.peers."
OURS = {"geostream", "sharding", "flows", "infra"}


@dataclass(frozen=True)
class Job:
    """All that a contestant is told."""

    url: str  # of the store, s3://…
    shards: list[str]  # presigned http URLs of the clustered layout's shards
    folder: str  # where the pairs lie on local disk
    scratch: str  # an empty folder for caches, removed afterwards
    batch_size: int
    workers: int
    tile: tuple[int, int]  # height, width
    view: tuple[int, int]


class Delivered(NamedTuple):
    """A batch: how many pairs, and their tensors (uint8, NCHW) where they were decoded."""

    pairs: int
    tile: Any = None
    view: Any = None


Read = Callable[[Job], Iterator[Delivered]]


def main(module: str, function: str, path: str) -> None:
    job = Job(**json.loads(Path(path).read_text()))
    read: Read = getattr(importlib.import_module(module), function)
    if module.startswith(PEERS):
        check_alone()
    cpu = sum(os.times()[:4])
    begin = time.perf_counter()
    first = end = begin
    pairs = batches = first_pairs = 0
    for batch in read(job):
        if batch.tile is not None:
            _check(batch, job)
        end = time.perf_counter()
        if not batches:
            first, first_pairs = end, batch.pairs
        batches += 1
        pairs += batch.pairs
    del batch
    result = {
        "pairs": pairs,
        "batches": batches,
        "seconds": end - begin,
        "pairs_per_s": pairs / (end - begin),
        "first_batch_s": first - begin,
        "pairs_per_s_after_first": (pairs - first_pairs) / (end - first) if batches > 1 else None,
        "cpu_s_before": cpu,
    }
    print(json.dumps(result), flush=True)


def check_alone() -> None:
    """Check that this process has imported none of our packages.

    Raises:
        RuntimeError: It has.
    """
    if ours := OURS & {name.partition(".")[0] for name in sys.modules}:
        raise RuntimeError(f"a peer's process has imported {', '.join(sorted(ours))}, which may slow the peer down")


def _check(batch: Delivered, job: Job) -> None:
    for tensor, size in ((batch.tile, job.tile), (batch.view, job.view)):
        if tuple(tensor.shape) != (batch.pairs, 3, *size) or str(tensor.dtype) != "torch.uint8":
            raise ValueError(f"a batch of {tensor.dtype} {tuple(tensor.shape)} where uint8 (B, 3, {size}) is wanted")


def write_job(job: Job, path: Path) -> None:
    path.write_text(json.dumps(asdict(job)))


if __name__ == "__main__":
    main(*sys.argv[1:])
