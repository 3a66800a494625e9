"""MosaicML Streaming on MDS shards of 64 MB that its writer wrote from the same JPEG bytes.

As its documentation has it: a subclass of StreamingDataset decodes in ``__getitem__``; ``shuffle=True`` with the batch
size given to dataset and loader; S3_ENDPOINT_URL names the server; the local folder is empty. The images' columns are
``bytes``, so that torchvision can decode them: what the type ``jpeg`` does with Pillow takes half as long again. Shards
are not compressed (JPEGs are). Runs in a virtual environment of its own: its pins (numpy, transformers) clash with
ours. Loader processes are spawned: forked ones share a connection to S3, on which one of them waits a minute for
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg

from tests.benchmarks.job import Delivered, Job
from tests.benchmarks.pairs import Pairs

FOLDER = "mosaic"


class _Decoded(StreamingDataset):
    def __getitem__(self, at: int) -> Any:
        sample = super().__getitem__(at)
        return _decode(sample["tile"]), _decode(sample["view"])


def _decode(data: bytes) -> torch.Tensor:
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def write(pairs: Path, out: Path) -> None:
    """Convert the pairs to MDS shards in ``out``."""
    with MDSWriter(out=str(out), columns={"tile": "bytes", "view": "bytes"}, size_limit=64 * 10**6) as writer:
        for tile, view in Pairs(pairs):
            writer.write({"tile": tile, "view": view})


def read(job: Job) -> Iterator[Delivered]:
    """Deliver all pairs, shuffled."""
    dataset = _Decoded(remote=f"{job.url}/{FOLDER}", local=job.scratch, shuffle=True, batch_size=job.batch_size)
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=job.batch_size, num_workers=job.workers, multiprocessing_context="spawn"
    )
    for tile, view in loader:
        yield Delivered(len(tile), tile, view)
