"""Neighbour graphs against the whole matrix of similarities: ``python -m tests.benchmarks.neighbours --json PATH``.

1. The exact mode through its real entry (Zarr on a local disk in, a committed graph out) against Sample4Geo's way, at
   N = 20,000 and 50,000, D = 512, K = 128; both read the same Zarr, use all cores, and run by turns in fresh processes.
2. The growth of the approximate mode over N = 100,000, 200,000 and 400,000, D = 256: the exponent of a straight line
   through log time, recall measured by brute force on 500 places beside the figure that the graph stores.
3. The growth of the GPS and the visual graph over N = 200,000, 400,000 and 800,000, D = 128, K = 64, with two Dask
   processes of one thread, and the most that any process holds.
Seconds leave imports out; memory is of the whole process, interpreter and libraries included. At most 11 GB are held
at once, 4 GB of disk, and some 25 minutes are taken on two cores; ``--quick`` takes three.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.measure import Result, figure, machine, ratio, run, summary

GIB = 2**30
#: Of the approximate mode, whole process: 0.4 GiB of libraries, two threads' blocks and finds, and what grows with N:
#: the layout's index and the graph itself in the end, 0.5 GiB for 400,000 places.
MEMORY_BOUND_GIB = 1.5


def job(*arguments: Any, module: str = "tests.benchmarks.neighbour_jobs") -> Result:
    return run([sys.executable, "-m", module, *map(str, arguments)], os.environ)


def against_the_matrix(work: Path, n: int, dim: int, repeats: int) -> dict[str, list[Result]]:
    folder = work / f"exact-{n}"
    job("make", folder, n, dim)
    results: dict[str, list[Result]] = {"ours": [], "sample4geo": []}
    for repeat in range(repeats):
        for contestant in results if repeat % 2 else reversed(list(results)):
            done = job(contestant, folder, *(["exact"] if contestant == "ours" else []))
            results[contestant].append(done)
            print(f"N = {n}: {contestant} {done['seconds']:.1f} s, {done['peak_bytes'] / GIB:.2f} GiB", file=sys.stderr)
    return results


def growth(work: Path, sizes: list[int], dim: int, repeats: int) -> dict[int, list[Result]]:
    """The sizes by turns, so that a busy minute of the machine does not befall one of them alone."""
    results: dict[int, list[Result]] = {n: [] for n in sizes}
    for n in sizes:
        job("make", work / f"growth-{n}", n, dim)
    for _ in range(repeats):
        for n in sizes:
            done = job("ours", work / f"growth-{n}", "approximate")
            done["recall"] = job("recall", work / f"growth-{n}")["recall"]
            results[n].append(done)
            print(f"N = {n}: {done}", file=sys.stderr)
    return results


def processes(work: Path, sizes: list[int], dim: int, k: int, repeats: int) -> dict[str, dict[int, list[Result]]]:
    """Both graphs, built by Dask processes; the sizes by turns."""
    results: dict[str, dict[int, list[Result]]] = {stage: {n: [] for n in sizes} for stage in ("gps", "visual")}
    for n in sizes:
        job("embeddings", work / f"processes-{n}", n, dim)
    for _ in range(repeats):
        for n in sizes:
            for stage, of_stage in results.items():
                done = job(stage, work / f"processes-{n}", n, dim, k, module="tests.mining.memory_job")
                of_stage[n].append(done)
                print(f"{stage}, N = {n}: {done}", file=sys.stderr)
    return results


def exponent(results: dict[int, list[Result]], repeat: int) -> float:
    seconds = [of_size[repeat]["seconds"] for of_size in results.values()]
    return float(np.polyfit(np.log(list(results)), np.log(seconds), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Neighbour graphs: exact against the whole matrix, approximate in growth"
    )
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5, help="of the comparison with the matrix")
    parser.add_argument("--growth-repeats", type=int, default=3)
    parser.add_argument(
        "--work", type=Path, help="folder for the data, on a disk with 3 GB; default: the temporary one"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run, not what does it give")
    options = parser.parse_args()
    sizes, grown, larger = [20_000, 50_000], [100_000, 200_000, 400_000], [200_000, 400_000, 800_000]
    if options.quick:
        sizes, grown, larger = [5_000, 10_000], [20_000, 40_000], [20_000, 40_000]
    figures: dict[str, Any] = {}
    raw: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for n in sizes:
            results = against_the_matrix(Path(folder), n, 512, options.repeats)
            for name, key, wanted in (("time", "seconds", "<= 0.6"), ("memory", "peak_bytes", "<= 0.25")):
                above, below = ([done[key] for done in results[who]] for who in ("ours", "sample4geo"))
                figures[f"{name}_{n // 1000}k"] = ratio(above, below, wanted)
            raw[f"exact_{n}"] = {who: {"repeats": of, "summary": summary(of)} for who, of in results.items()}
        runs = growth(Path(folder), grown, 256, options.growth_repeats)
        stages = processes(Path(folder), larger, 128, 64, options.growth_repeats)
    for n, of_size in runs.items():
        figures[f"recall_{n // 1000}k"] = figure([done["recall"] for done in of_size], ">= 0.99")
        peaks = [done["peak_bytes"] / GIB for done in of_size]
        figures[f"memory_gib_{n // 1000}k"] = figure(peaks, f"<= {MEMORY_BOUND_GIB}")
        raw[f"approximate_{n}"] = {"repeats": of_size, "summary": summary(of_size)}
    slopes = [exponent(runs, repeat) for repeat in range(options.growth_repeats)]
    figures["growth_exponent"] = figure(slopes, "<= 1.3")
    for stage, most in (("gps", 1.15), ("visual", 1.25)):
        slopes = [exponent(stages[stage], repeat) for repeat in range(options.growth_repeats)]
        figures[f"{stage}_growth_exponent"] = figure(slopes, f"<= {most}")
        for n, of_size in stages[stage].items():
            peaks = [done["most"] / 1e9 for done in of_size]
            figures[f"{stage}_process_gb_{n // 1000}k"] = figure(peaks, "<= 2.5")
            raw[f"{stage}_{n}"] = {"repeats": of_size, "summary": summary(of_size)}
    options.json.write_text(json.dumps({"machine": machine(), "figures": figures, "raw": raw}, indent=1))
    for name, value in figures.items():
        print(f"{name:20} {value['value']:.3f}  wanted {value['wanted']}  {'met' if value['met'] else 'NOT MET'}")


if __name__ == "__main__":
    main()
