"""Does the trainer wait for the control plane: ``python -m tests.benchmarks.overlap --json PATH``.

A run of eight epochs that mines after every epoch and rewrites its shards once, with a stand-in for a GPU: a step is
a wait, half as fast as two cores can feed. Measured is the share of the wall clock, from the first step's begin to
the last step's end, that is no step: once with the lag of an epoch (mining, planning and rewriting beside the
training), once without (between two epochs, as before). The images are rendered and JPEG-compressed. The network that
embeds is real and trained, but smaller than the demo's: a GPU would run it, so it must not take the core that all
else has. How much of a GPU's time the pass takes is not measured here: about a third of an epoch that is mined.
Evaluation is left out. Then the demo's own training, on the demo's cities: seconds that are neither training nor
evaluation, for each second of training. Last, whether the pass over the training set could be saved: neighbour lists
and plans from the vectors that training steps compute, against those of a pass
(:mod:`tests.benchmarks.overlap_harvest`).

Contestants run as fresh processes, one after the other. About fifteen minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.rendered import render, shard_options
from geostream.store import Store
from sharding import ShardOptions, read_places, shard
from tests.benchmarks import measure
from tests.benchmarks.measure import Failed, figure, machine, run

DATASET = "simcity"
WANTED_SHARE = "<= 0.03"
WANTED_DEMO = "<= 0.06"
LEARNT_EPOCHS, HARVESTED_EPOCHS = 3, 4
LIMIT = 1200.0  # seconds a contestant may take


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.benchmarks.overlap", description=__doc__.split("\n")[0])
    arguments.add_argument("--json", type=Path, required=True, help="where the result goes")
    arguments.add_argument("--repeats", type=int, default=2, help="default %(default)s")
    arguments.add_argument("--epochs", type=int, default=8, help="default %(default)s")
    arguments.add_argument("--city", default="demo", help="size of the rendered cities: demo or small")
    arguments.add_argument("--without-demo", action="store_true", help="leave the demo's own trainings out")
    options = arguments.parse_args()
    measure.LIMIT = LIMIT
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="geostream-overlap-") as scratch:
        try:
            result = benchmark(Path(scratch), options, console)
        except Failed as error:
            console.print(str(error), markup=False)
            return 1
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    rows = Table("figure", "value", "wanted", "met")
    for name, one in result["figures"].items():
        rows.add_row(name, f"{one['value']:.4f}", one["wanted"] or "", {True: "yes", False: "no"}.get(one["met"], ""))
    console.print(rows)
    return 0


def benchmark(folder: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run all contestants; return the figures, and what each contestant told of itself."""
    render(folder / "raw", "vigor", options.city, 0)
    store = Store.open(str(folder / "store"))
    shard(read_places("vigor", folder / "raw"), store, DATASET, options=ShardOptions(**shard_options("vigor")))
    work([str(folder / "store"), "learn", "0", str(LEARNT_EPOCHS)])
    step = contestant(folder, "feed", 0.0, 1)["step_seconds"]
    told: dict[str, list[dict[str, Any]]] = {"beside": [], "between": []}
    for repeat in range(options.repeats):
        for name in ("beside", "between") if repeat % 2 == 0 else ("between", "beside"):
            one = contestant(folder, name, step, options.epochs)
            console.print(f"{name}: {one['share']:.3f} of {one['wall_seconds']:.0f} s is no step", highlight=False)
            if len(one["reclusterings"]) != 1:
                raise Failed(f"{name}: {len(one['reclusterings'])} reclusterings, and one is to be measured")
            told[name].append(one)
    shares = {name: [one["share"] for one in ones] for name, ones in told.items()}
    figures = {
        "share_not_training": figure(shares["beside"], WANTED_SHARE),
        "share_not_training_before": reported(shares["between"]),
    }
    if not options.without_demo:
        told["demo"] = [contestant(folder, "demo", 0.0, 0) for _ in range(options.repeats)]
        ratios = [one["not_training_for_training"] for one in told["demo"]]
        figures["demo_not_training_for_training"] = figure(ratios, WANTED_DEMO)
        told["harvest"] = [contestant(folder, "harvest", 0.0, HARVESTED_EPOCHS)]
        for name in ("harvest_in_common", "harvest_score", "pass_score"):
            figures[name] = reported([epoch[name] for epoch in told["harvest"][0]["epochs"]])
    return {"figures": figures, "step_seconds": step, "contestants": told, "machine": machine()}


def reported(values: list[float]) -> dict[str, Any]:
    """Return a figure of which nothing is wanted."""
    return {"value": statistics.median(values), "wanted": None, "met": None, "spread": [min(values), max(values)]}


def contestant(folder: Path, name: str, step: float, epochs: int) -> dict[str, Any]:
    """Run one contestant on a fresh copy of the store."""
    home = folder / "at-work"
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(folder / "store", home)
    return work([str(home), name, str(step), str(epochs)])


def work(arguments: list[str]) -> dict[str, Any]:
    """Run a contestant as a process of its own."""
    return run(
        [sys.executable, "-m", "tests.benchmarks.overlap_run", *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
    )


if __name__ == "__main__":
    sys.exit(main())
