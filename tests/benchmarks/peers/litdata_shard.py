"""LitData's ``optimize`` with as many workers, into chunks of 128 MiB.

An item is one image, since its items must all have the same number of parts, and places differ in their views: which
asks less of it than keeping a place together. The function and the images' list are handed over as its documentation
has it; inputs are numbers, so that it copies no raw files.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import litdata

from tests.benchmarks.peers.pillow_shard import stored
from tests.benchmarks.shard_run import SHARD_BYTES, Job, Listed


def write(job: Job) -> None:
    images = [image for place in job.listed() for image in place]
    litdata.optimize(
        fn=partial(_sample, Path(job.raw), images),
        inputs=list(range(len(images))),
        output_dir=job.out,
        chunk_bytes=SHARD_BYTES,
        num_workers=job.workers,
        verbose=False,
    )


def _sample(raw: Path, images: list[Listed], number: int) -> dict[str, Any]:
    return {"path": images[number].path, "jpeg": stored(raw, images[number])}


def read(job: Job) -> Iterator[tuple[str, bytes]]:
    for item in litdata.StreamingDataset(job.out):
        yield item["path"], item["jpeg"]
