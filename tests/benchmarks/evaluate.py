"""Evaluation at full size, both ways: ``python -m tests.benchmarks.evaluate --json PATH``.

100,000 views look for their tile among 100,000, and these tiles for their views, from Zarr on a local disk through the
real entry. What is wanted is memory: of the whole process, interpreter and libraries included, 4 GiB at most, where the
matrix of similarities alone would take 40. The embeddings are random; each view is its tile with as much noise as
leaves some of them unfound. Takes 1 GB of disk and, on two quiet cores, some 20 minutes; ``--quick`` (10,000) takes
seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import measure
from tests.benchmarks.measure import figure, machine, run

GIB = 2**30
DIM = 1024
HOUR = 3600.0


def layout_of(store: Any, n: int) -> Any:
    from tests.evaluation.galleries import Spot, gallery_of

    return gallery_of(store, [Spot()] * n, ("both-ways",))


def make(folder: Path, n: int) -> dict[str, Any]:
    """Embeddings of ``n`` places with a view each, a block of rows at a time."""
    from geostream.mining.embeddings import SHARD_ROWS, create_embeddings
    from geostream.store import Store

    store = Store.open(folder)
    layout = layout_of(store, n)
    writer = create_embeddings(
        store, "all.zarr", layout=layout, checkpoint="", split="test", pairs=layout.pairs("test"),
        reference_place=layout.references("test"), dim=DIM,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for start in range(0, n, SHARD_ROWS):
        rows = np.arange(start, min(start + SHARD_ROWS, n))
        tile = rng.standard_normal((len(rows), DIM), dtype=np.float32)
        view = tile + 7 * rng.standard_normal(tile.shape, dtype=np.float32)
        for vectors, write in ((tile, writer.write_reference), (view, writer.write_query)):
            write(rows, vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    writer.commit()
    return {}


def evaluate(folder: Path, n: int) -> dict[str, Any]:
    from geostream.evaluation.evaluate import evaluate_embeddings
    from geostream.mining.embeddings import open_embeddings
    from geostream.store import Store

    store = Store.open(folder)
    layout = layout_of(store, n)
    begun = time.perf_counter()
    found = evaluate_embeddings(layout, open_embeddings(store, "all.zarr", layout))
    return {"seconds": time.perf_counter() - begun, "rows": found.others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="10,000 × 10,000")
    options = parser.parse_args()
    n = 10_000 if options.quick else 100_000
    measure.LIMIT = HOUR  # one process, and a long one

    def job(name: str, folder: str) -> dict[str, Any]:
        return run([sys.executable, "-m", "tests.benchmarks.evaluate", name, folder, str(n)], os.environ)

    with tempfile.TemporaryDirectory() as folder:
        job("make", folder)
        done = job("evaluate", folder)
    figures = {"peak_gib": figure([done["peak_bytes"] / GIB], "<= 4")}
    gigaflops = 2 * 2 * n * n * DIM / done["seconds"] / 1e9
    raw = {"queries": n, "gallery": n, "dim": DIM, "float64_gigaflops": gigaflops, "repeats": [done]}
    options.json.write_text(json.dumps({"machine": machine(), "figures": figures, "raw": raw}, indent=1) + "\n")
    print(f"{n:,} × {n:,} both ways: {done['seconds']:.0f} s, peak {done['peak_bytes'] / GIB:.2f} GiB")


if __name__ == "__main__":
    if sys.argv[1:2] in (["make"], ["evaluate"]):
        work = {"make": make, "evaluate": evaluate}[sys.argv[1]]
        print(json.dumps(work(Path(sys.argv[2]), int(sys.argv[3]))))
    else:
        main()
