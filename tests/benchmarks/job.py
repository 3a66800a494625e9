"""One contestant, once, in a process of its own: ``python -m tests.benchmarks.job MODULE FUNCTION JOB.json``.

Decides what the clock sees: imports are over, and it starts when the contestant is asked for its first batch, so that
opening indices, building datasets and starting workers count. Every batch's tensors are checked for their shape. The
result is one line of JSON on standard output, the last.
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

from tests.benchmarks.traffic import Traffic


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


Read = Callable[[Job, Traffic], Iterator[Delivered]]


def main(module: str, function: str, path: str) -> None:
    job = Job(**json.loads(Path(path).read_text()))
    read: Read = getattr(importlib.import_module(module), function)
    traffic = Traffic()
    cpu = sum(os.times()[:4])
    begin = time.perf_counter()
    first = end = begin
    pairs = batches = first_pairs = 0
    for batch in read(job, traffic):
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
        **traffic.as_dict(),
    }
    print(json.dumps(result), flush=True)


def _check(batch: Delivered, job: Job) -> None:
    for tensor, size in ((batch.tile, job.tile), (batch.view, job.view)):
        if tuple(tensor.shape) != (batch.pairs, 3, *size) or str(tensor.dtype) != "torch.uint8":
            raise ValueError(f"a batch of {tensor.dtype} {tuple(tensor.shape)} where uint8 (B, 3, {size}) is wanted")


def write_job(job: Job, path: Path) -> None:
    path.write_text(json.dumps(asdict(job)))


if __name__ == "__main__":
    main(*sys.argv[1:])
