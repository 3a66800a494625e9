"""LanceDB's StreamingDataset on a table that its ``create_table`` wrote from the same JPEG bytes.

As its documentation has it: rows are shuffled in clumps of 16 (``shuffle_clump_size``), because single rows are slow to
read from object storage; a ``transform`` decodes with torchvision, in as many threads as the others have workers, and
without worker processes, because torchvision releases the GIL. StreamingDataLoader is its loader.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import lancedb
import pyarrow as pa
import torch
from lancedb.streaming import StreamingDataLoader, StreamingDataset
from torchvision.io import ImageReadMode, decode_jpeg

from tests.benchmarks.job import Delivered, Job
from tests.benchmarks.pairs import Pairs

FOLDER = "lancedb"
TABLE = "pairs"
CLUMP = 16  # rows, the value of its documentation
ROWS = 256  # of a record batch that is written

SCHEMA = pa.schema([("tile", pa.large_binary()), ("view", pa.large_binary())])


def write(pairs: Path, out: Path) -> None:
    """Write the pairs to a table in ``out``."""

    def batches() -> Iterator[pa.RecordBatch]:
        opened = Pairs(pairs)
        for start in range(0, len(opened), ROWS):
            rows = [opened[number] for number in range(start, min(start + ROWS, len(opened)))]
            yield pa.record_batch([list(column) for column in zip(*rows, strict=True)], schema=SCHEMA)

    lancedb.connect(out).create_table(TABLE, batches(), schema=SCHEMA)


def read(job: Job) -> Iterator[Delivered]:
    """Deliver all pairs, shuffled."""
    options = {"aws_endpoint": os.environ["AWS_ENDPOINT_URL"], "allow_http": "true"}
    table = lancedb.connect(f"{job.url}/{FOLDER}", storage_options=options).open_table(TABLE)
    dataset = StreamingDataset(table, shuffle_clump_size=CLUMP, transform=_decoded, transform_parallelism=job.workers)
    for batch in StreamingDataLoader(dataset, batch_size=job.batch_size):
        yield Delivered(len(batch["tile"]), batch["tile"], batch["view"])


def _decoded(batch: pa.RecordBatch) -> list[dict[str, torch.Tensor]]:
    return [
        {name: decode_jpeg(_bytes(data), mode=ImageReadMode.RGB) for name, data in row.items()}
        for row in batch.to_pylist()
    ]


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
