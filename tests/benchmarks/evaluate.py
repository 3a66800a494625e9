"""Evaluation at full size: ``python -m tests.benchmarks.evaluate --json PATH``.

Two cases, from Zarr on a local disk through the real entry, each in a process of its own:

- both ways: 100,000 views look for their tile among 100,000, and these tiles for their views; 1024 dimensions. What is
  wanted is memory: of the whole process, interpreter and libraries included, 4 GiB at most, where the matrix of
  similarities alone would take 40.
- paired: 100,000 views look for their tile among 1,000,000; 128 dimensions, and with ``--wide`` 1024 as well. At most
  2.5 GiB, where the tiles alone take 4 with 1024 dimensions.

And, on a part that is in memory, how long `rank_positives` takes against the same ranks by float64 alone: by turns, in
one process.

The embeddings are random; each view is its tile with as much noise as leaves some of them unfound. Takes 1 GB of disk
(``--wide``: 4.5) and, on two quiet cores, some 20 minutes (``--wide``: an hour). ``--quick`` takes a minute: 10,000
queries, on as many tiles both ways, and on 50,000 paired.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.benchmarks import measure
from tests.benchmarks.measure import figure, machine, ratio, run

GIB = 2**30
HOUR = 3600.0
COMPARED = {False: (4096, 32_768), True: (1024, 16_384)}  # queries and tiles against float64; True: --quick
TURNS = 5


class Case(NamedTuple):
    """What is evaluated. With as many queries as tiles, both ways."""

    queries: int
    tiles: int
    dim: int

    @property
    def protocol(self) -> str:
        return "both-ways" if self.queries == self.tiles else "paired"

    def __str__(self) -> str:
        return f"{self.queries:,} × {self.tiles:,} × {self.dim}, {self.protocol}"


def shown(case: Case, start: int, stop: int) -> Any:
    """Which of the places ``start`` to ``stop`` have a view: evenly many everywhere."""
    place = np.arange(start, stop)
    return place * case.queries // case.tiles < (place + 1) * case.queries // case.tiles


def layout_of(store: Any, case: Case) -> Any:
    """The index of the places, made by columns: rows as dictionaries would take gigabytes."""
    import pyarrow as pa

    from geostream.layout import MEMBERS, PLACES, Layout

    def lists(lengths: Any, values: Any) -> Any:
        return pa.ListArray.from_arrays(np.append(0, np.cumsum(lengths)).astype(np.int32), values)

    n, queries = case.tiles, case.queries
    view = PLACES.field("views").type.value_type
    empty = {"name": "view-00", "split": "test", "source": "", "north": 0.0, "east": 0.0, "semi_positives": []}
    views = pa.StructArray.from_arrays(
        [pa.repeat(pa.scalar(empty[field.name], field.type), queries) for field in view], fields=list(view)
    )
    columns = {
        "key": pa.array([f"place-{i:07d}" for i in range(n)]),
        "area": pa.repeat("city", n),
        "splits": lists(np.ones(n), pa.repeat("test", n)),
        "north": pa.repeat(0.0, n),
        "east": pa.repeat(0.0, n),
        "source": pa.repeat("", n),
        "views": lists(shown(case, 0, n), views),
    }
    info: dict[str, Any] = {"dataset": "hand", "layout": "g0", "id": "layout", "generation": 0}
    info |= {"coordinates": "utm", "protocols": [case.protocol], "index": {"places.parquet": "places"}}
    return Layout(store, info, pa.table(columns, schema=PLACES), MEMBERS.empty_table())


def pair_vectors(rng: np.random.Generator, n: int, dim: int) -> tuple[Any, Any]:
    """Tiles and their views, n vectors of length 1 each."""
    tile = rng.standard_normal((n, dim), dtype=np.float32)
    noise = np.float32(round(math.sqrt(dim / 20.5 - 1), 1))  # 7 with 1024 dimensions
    view = tile + noise * rng.standard_normal(tile.shape, dtype=np.float32)
    return tuple(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (tile, view))


def make(folder: Path, case: Case) -> dict[str, Any]:
    """Embeddings of the places, a block of rows at a time."""
    from geostream.mining.embeddings import SHARD_ROWS, create_embeddings
    from geostream.store import Store

    store = Store.open(folder)
    layout = layout_of(store, case)
    writer = create_embeddings(
        store, "all.zarr", layout=layout, checkpoint="", split="test", pairs=layout.pairs("test"),
        reference_place=layout.references("test"), dim=case.dim,
    )  # fmt: skip
    rng, done = np.random.default_rng(0), 0
    for start in range(0, case.tiles, SHARD_ROWS):
        stop = min(start + SHARD_ROWS, case.tiles)
        tile, view = pair_vectors(rng, stop - start, case.dim)
        view = view[shown(case, start, stop)]
        writer.write_reference(np.arange(start, stop), tile)
        writer.write_query(np.arange(done, done + len(view)), view)
        done += len(view)
    writer.commit()
    return {}


def evaluate(folder: Path, case: Case) -> dict[str, Any]:
    from geostream.evaluation.evaluate import evaluate_embeddings
    from geostream.evaluation.metrics import named_rows
    from geostream.mining.embeddings import open_embeddings
    from geostream.store import Store

    store = Store.open(folder)
    layout = layout_of(store, case)
    begun = time.perf_counter()
    found = evaluate_embeddings(layout, open_embeddings(store, "all.zarr", layout))
    return {"seconds": time.perf_counter() - begun, "rows": named_rows(asdict(found))}


def compare(_: Path, case: Case) -> dict[str, Any]:
    """Seconds of both ways, by turns, on the same vectors in memory."""
    from geostream.arrays import Csr
    from geostream.evaluation.ranks import rank_positives
    from geostream.mining.embeddings import SHARD_ROWS
    from tests.evaluation.float64_ranks import rank_in_float64

    tile, view = pair_vectors(np.random.default_rng(0), case.tiles, case.dim)
    rows = np.flatnonzero(shown(case, 0, case.tiles))
    positives = Csr(np.arange(len(rows) + 1), rows.astype(np.int32))
    none = Csr(np.zeros(len(rows) + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
    seconds: dict[str, list[float]] = {"float32_first": [], "float64": []}
    wrong = {}
    for turn in range(TURNS + 1):
        for name, way in (("float32_first", rank_positives), ("float64", rank_in_float64)):
            blocks = ((start, tile[start : start + SHARD_ROWS]) for start in range(0, case.tiles, SHARD_ROWS))
            begun = time.perf_counter()
            wrong[name] = way(view[rows], tile[rows], positives, none, blocks).wrong
            if turn:  # the first is a warm-up
                seconds[name].append(time.perf_counter() - begun)
    assert np.array_equal(wrong["float32_first"], wrong["float64"])
    return dict(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="10,000 × 10,000 both ways, 10,000 × 50,000 paired")
    parser.add_argument("--wide", action="store_true", help="paired with 1024 dimensions, too")
    options = parser.parse_args()
    queries = 10_000 if options.quick else 100_000
    tiles = 50_000 if options.quick else 1_000_000
    measure.LIMIT = 3 * HOUR  # one process, and a long one

    def job(name: str, folder: str, case: Case) -> dict[str, Any]:
        result = run([sys.executable, "-m", "tests.benchmarks.evaluate", name, folder, *map(str, case)], os.environ)
        return result | {"queries": case.queries, "gallery": case.tiles, "dim": case.dim}

    both = Case(queries, queries, 1024)
    dims = (128, 1024) if options.wide else (128,)
    wanted = {"peak_gib": (both, "<= 4")} | {f"paired_{d}_peak_gib": (Case(queries, tiles, d), "<= 2.5") for d in dims}
    figures, raw = {}, {}
    for name, (case, bound) in wanted.items():
        with tempfile.TemporaryDirectory() as folder:
            job("make", folder, case)
            done = job("evaluate", folder, case)
        figures[name] = figure([done["peak_bytes"] / GIB], bound)
        directions = 2 if case.protocol == "both-ways" else 1
        done["gigaflops"] = 2 * directions * case.queries * case.tiles * case.dim / done["seconds"] / 1e9
        raw[str(case)] = done
        print(f"{case}: {done['seconds']:.0f} s, peak {done['peak_bytes'] / GIB:.2f} GiB")
    for dim in (128, 1024):
        turns = job("compare", "", Case(*COMPARED[options.quick], dim))
        figures[f"seconds_of_float64_{dim}"] = ratio(turns["float32_first"], turns["float64"], "<= 0.6")
        raw[f"against float64, {dim} dimensions"] = turns
        print(f"{dim} dimensions: {figures[f'seconds_of_float64_{dim}']['value']:.2f} of the seconds of float64")
    options.json.write_text(json.dumps({"machine": machine(), "figures": figures, "raw": raw}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] in (["make"], ["evaluate"], ["compare"]):
        work = {"make": make, "evaluate": evaluate, "compare": compare}[sys.argv[1]]
        print(json.dumps(work(Path(sys.argv[2]), Case(*map(int, sys.argv[3:6])))))
    else:
        main()
