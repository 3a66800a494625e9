"""What every stage takes at a million places and more: ``python -m tests.benchmarks.scale --json PATH``.

Layout and embeddings are synthetic (:mod:`tests.benchmarks.scale_places`), D = 128, K = 64, without images; Dask has
two processes of one thread. Every stage runs in a process of its own, and the most that any process has held counts.
Stages:

- ``open``: open a layout, and what a trainer needs of it at once
- ``gps``, ``visual``: the neighbour graphs
- ``plan``: the third of three epochs, with 64 lanes, by two Dask processes
- ``quality``: the same with 8 lanes, at the smallest size: 64 lanes of 8 resident shards are more than 5 % of a million
- ``loader``: what a trainer does with the plan, and its two loader processes before their first read
- ``order``: the similarity order; the shards themselves are not rewritten
- ``scaling``: the visual graph and the plan by one Dask process, at the smallest size. It has one core for itself, the
  client and the scheduler, as two processes have two

A stage that others need is run before them. Seconds are of the clock, growth is a straight line through their
logarithms; planning is told by seconds of a core, over all processes. ``coefficients`` are for other sizes: of the
largest one measured, and memory as the slope over all sizes. With ``--keep FOLDER`` data and finished measurements
stay, and a further call goes on behind them. A million places take some 5 GB of disk, ten million 40 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from tests.benchmarks.measure import Failed, Result, figure, figures_table, machine, run

SIZES, QUICK = [1_000_000, 3_000_000], [20_000, 60_000]
LANES, FEW_LANES = 64, 8
LIMIT = 4 * 3600.0  # seconds that a job may take
MOST_GB, GROWTH, VISUAL_GROWTH = "<= 2.5", "<= 1.15", "<= 1.25"
QUALITY = {"hardness_score": ">= 1.0", "overlap": "<= 0.10", "resident_share": "<= 0.05", "amplification": "<= 1.05"}
#: Objects on the store, by the folder that holds them.
OBJECTS = {
    "index": "places/layouts/base",
    "embeddings": "run/embeddings",
    "gps_graph": "run/neighbours/gps.zarr",
    "visual_graph": "run/neighbours/visual.zarr",
    "plans": f"run/plans-{LANES}",
}


class Step(NamedTuple):
    """A job with the lanes of its plan."""

    job: str
    lanes: int = LANES

    @property
    def name(self) -> str:
        return self.job if self.lanes == LANES else f"{self.job}-{self.lanes}-lanes"


class Stage(NamedTuple):
    """What is measured together; ``needs`` are the stages whose results it reads."""

    steps: list[Step]
    needs: list[str]
    smallest_only: bool = False


STAGES = {
    "open": Stage([Step("open")], []),
    "gps": Stage([Step("gps")], []),
    "visual": Stage([Step("visual")], []),
    "plan": Stage([Step("history"), Step("plan")], ["visual"]),
    "quality": Stage([Step("history", FEW_LANES), Step("plan", FEW_LANES)], ["visual"], smallest_only=True),
    "loader": Stage([Step("loader")], ["plan"]),
    "order": Stage([Step("order")], ["visual"]),
    "scaling": Stage([Step("visual-by-one"), Step("plan-by-one")], ["visual", "plan"], smallest_only=True),
}
GROWING = [name for name, stage in STAGES.items() if not stage.smallest_only]  # each ends with a job of its own name
Measured = dict[int, dict[str, Result]]  # by size and name of the step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="default: 1000000 3000000")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keeps data and what is measured, and goes on with it"
    )
    parser.add_argument("--quick", action="store_true", help="20,000 and 60,000 places: does it run?")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no process is left running
    sizes = sorted(set(options.sizes or (QUICK if options.quick else SIZES)))
    with tempfile.TemporaryDirectory(prefix="geostream-scale-") as scratch:
        folder = (options.keep or Path(scratch)).resolve()
        measured, failed = measure(folder, sizes, with_needs(options.stages))
        stored = {n: on_the_store(folder / str(n)) for n in sizes}
    result = {
        "machine": machine(),
        "figures": figures(measured),
        "coefficients": coefficients(measured, stored),
        "raw": {str(n): of_size for n, of_size in measured.items()},
        "failed": failed,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    Console().print(figures_table(result["figures"]))
    return 1 if failed else 0


def with_needs(stages: Sequence[str]) -> list[str]:
    """Return the stages and those that they need, in the order of ``STAGES``."""
    wanted = set(stages)
    for name in reversed(STAGES):  # a stage needs only earlier ones
        if name in wanted:
            wanted |= set(STAGES[name].needs)
    return [name for name in STAGES if name in wanted]


def measure(folder: Path, sizes: Sequence[int], stages: Sequence[str]) -> tuple[Measured, dict[str, str]]:
    """Run all jobs, smaller sizes first; return what was measured, and the errors of jobs that failed.

    A stage that fails takes those with it that need it, and no others.
    """
    measured: Measured = {n: {} for n in sizes}
    failed: dict[str, str] = {}
    for n in sizes:
        lost = set[str]()
        for stage, step in jobs(stages, smallest=n == sizes[0]):
            if stage in lost or lost & set(STAGES[stage].needs if stage in STAGES else []):
                lost.add(stage)
                continue
            try:
                measured[n][step.name] = job(folder / str(n), n, step)
            except Failed as error:
                if step.job == "make":
                    raise
                lost.add(stage)
                failed[f"{n}: {step.name}"] = str(error)
                print(f"{n:,} places, {step.name}: failed\n{error}", file=sys.stderr, flush=True)
    return measured, failed


def jobs(stages: Sequence[str], smallest: bool) -> Iterator[tuple[str, Step]]:
    yield "make", Step("make")
    for name in stages:
        if smallest or not STAGES[name].smallest_only:
            yield from ((name, step) for step in STAGES[name].steps)


def job(home: Path, n: int, step: Step) -> Result:
    """Run a job in a process of its own, or return what an earlier call has measured."""
    file = home / "measured" / f"{step.name}.json"
    if file.exists():
        kept: Result = json.loads(file.read_text())
        return kept
    command = ["tests.benchmarks.scale_jobs", step.job, home / "store", n, step.lanes]
    started = time.perf_counter()
    done = run([sys.executable, "-m", *map(str, command)], os.environ | {"OMP_NUM_THREADS": "1"}, limit=LIMIT)
    taken = time.perf_counter() - started
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(done, indent=1) + "\n")
    what = f"{n:,} places, {step.name}: {done['seconds']:.1f} s, {done['most_bytes'] / 1e9:.2f} GB"
    print(f"{what} ({taken:.0f} s in all)", file=sys.stderr, flush=True)
    return done


def on_the_store(home: Path) -> dict[str, dict[str, int]]:
    """Return the objects of each kind and their bytes."""
    found = {}
    for kind, folder in OBJECTS.items():
        sizes = [path.stat().st_size for path in (home / "store" / folder).rglob("*") if path.is_file()]
        found[kind] = {"objects": len(sizes), "bytes": sum(sizes)}
    return found


def figures(measured: Measured) -> dict[str, Any]:
    """What is wanted, of whatever was measured."""
    made: dict[str, Any] = {}
    for stage in GROWING:
        for n, done in _of(measured, stage).items():
            made[f"{stage}_gb_{_short(n)}"] = figure([done["most_bytes"] / 1e9], MOST_GB)
    for stage in GROWING:
        if len(of_stage := _of(measured, stage)) > 1:
            wanted = VISUAL_GROWTH if stage == "visual" else GROWTH
            made[f"{stage}_growth"] = figure([exponent({n: one["seconds"] for n, one in of_stage.items()})], wanted)
    for n, done in _of(measured, "plan").items():
        made[f"pairs_per_minute_and_core_{_short(n)}"] = figure([60 * n / done["cpu_seconds"]], ">= 1.3e6")
    for n, done in _of(measured, "loader").items():
        made[f"loader_process_gb_{_short(n)}"] = figure([done["beyond_bytes"] / 1e9], "<= 0.5")
    smallest = measured[min(measured)]
    if few := smallest.get(f"plan-{FEW_LANES}-lanes"):
        for name, wanted in QUALITY.items():
            if few["quality"][name] is not None:
                made[name] = figure([few["quality"][name]], wanted)
    for stage in ("visual", "plan"):
        if (alone := smallest.get(f"{stage}-by-one")) and (both := smallest.get(stage)):
            made[f"{stage}_speedup"] = figure([alone["seconds"] / both["seconds"]], ">= 1.8")
            if stage == "plan":
                made["same_plan"] = figure([float(alone["hash"] == both["hash"])], ">= 1")
    return made


def coefficients(measured: Measured, stored: Mapping[int, dict[str, dict[str, int]]]) -> dict[str, Any]:
    """What to compute other sizes from: of the largest one that was measured, and memory as a slope over all."""
    made: dict[str, Any] = {"per_place": {}, "of_the_slope": {}, "store": {}}
    for stage in GROWING:
        if not (of_stage := _of(measured, stage)):
            continue
        n = max(of_stage)
        of_largest = of_stage[n]
        names = ("cpu_seconds", "bytes_read", "bytes_written", "requests")
        made["per_place"][stage] = {"places": n} | {name: of_largest[name] / n for name in names}
        if len(of_stage) > 1:
            made["of_the_slope"][stage] = {
                f"{who}_bytes_per_place": slope({size: one[f"{who}_bytes"] for size, one in of_stage.items()})
                for who in ("client", "worker", *(["beyond"] if stage == "loader" else []))
            }
    n = max(stored)
    for kind, found in stored[n].items():
        made["store"][kind] = {"places": n} | {f"{name}_per_place": value / n for name, value in found.items()}
    return made


def _of(measured: Measured, step: str) -> dict[int, Result]:
    return {n: of_size[step] for n, of_size in measured.items() if step in of_size}


def exponent(values: Mapping[int, float]) -> float:
    """Return the slope of a straight line through the logarithms of sizes and values."""
    return float(np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)[0])


def slope(values: Mapping[int, float]) -> float:
    """Return the slope of a straight line through sizes and values."""
    return float(np.polyfit(list(values), list(values.values()), 1)[0])


def _short(n: int) -> str:
    return f"{n // 1_000_000}m" if n % 1_000_000 == 0 else f"{n // 1000}k"


if __name__ == "__main__":
    sys.exit(main())
