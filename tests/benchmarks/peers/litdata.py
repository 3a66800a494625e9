"""LitData on chunks of 64 MB that its ``optimize`` wrote from the same JPEG bytes.

As its documentation has it: images wrapped in ``Image`` are stored as they are and decoded by torchvision;
StreamingDataset with ``shuffle=True`` and the endpoint in ``storage_options`` under StreamingDataLoader. What makes it
faster is on by itself for S3: workers fetch chunks ahead asynchronously, by obstore. They fall back to boto3 if they
were forked from a process in which LitData had started obstore, so this is checked. The cache folder is empty.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import litdata
from litdata.streaming import downloader

from tests.benchmarks.job import Delivered, Job
from tests.benchmarks.pairs import Pairs

FOLDER = "litdata"


def write(pairs: Path, out: Path) -> None:
    """Convert the pairs to chunks in ``out``."""
    litdata.optimize(
        fn=partial(_sample, pairs),
        inputs=list(range(len(Pairs(pairs)))),
        output_dir=str(out),
        chunk_bytes="64MB",
        num_workers=1,
    )


def _sample(pairs: Path, number: int) -> dict[str, Any]:
    tile, view = Pairs(pairs)[number]
    return {"tile": litdata.Image(bytes=tile), "view": litdata.Image(bytes=view)}


def read(job: Job) -> Iterator[Delivered]:
    """Deliver all pairs, shuffled."""
    # Without this its fast path refuses our server's plain http; there is no public setting for it.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    dataset = litdata.StreamingDataset(
        f"{job.url}/{FOLDER}",
        cache_dir=job.scratch,
        shuffle=True,
        storage_options={
            "endpoint_url": os.environ["AWS_ENDPOINT_URL"],
            "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"],
        },
    )
    for batch in litdata.StreamingDataLoader(dataset, batch_size=job.batch_size, num_workers=job.workers):
        yield Delivered(len(batch["tile"]), batch["tile"], batch["view"])
    if downloader._OBSTORE_INIT_PID is not None:
        raise RuntimeError("obstore was started before LitData's workers, so these have fetched their chunks by boto3")
