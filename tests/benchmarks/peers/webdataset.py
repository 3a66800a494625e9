"""webdataset on the clustered layout's own tar shards.

As its documentation has it: shards are shuffled, samples go through a shuffle buffer of 1,000, are decoded and batched
in the workers, and WebLoader hands on whole batches. It reads S3 through a command: http URLs, here presigned ones, go
to curl; ``pipe:aws s3 cp``, the other documented way, starts a Python process a shard and is slower. JPEGs go through a
decoder function, as documented, here torchvision's: what ``decode("torchrgb8")`` does with Pillow takes half as long
again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import webdataset as wds
from torchvision.io import ImageReadMode, decode_jpeg

from tests.benchmarks.job import Delivered, Job

SHUFFLE = 1000


def read(job: Job) -> Iterator[Delivered]:
    """Deliver all pairs, shuffled."""
    dataset = (
        wds.WebDataset(job.shards, shardshuffle=len(job.shards), seed=0)
        .shuffle(SHUFFLE)
        .decode(_decode)
        .to_tuple("tile.jpg", "view-00.jpg")
        .batched(job.batch_size)
    )
    for tile, view in wds.WebLoader(dataset, batch_size=None, num_workers=job.workers):
        yield Delivered(len(tile), tile, view)


def _decode(key: str, data: bytes) -> torch.Tensor | None:
    if not key.endswith(".jpg"):
        return None
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
