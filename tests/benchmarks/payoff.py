"""Does mining pay, and does streaming cost any of it: ``python -m tests.benchmarks.payoff --json PATH``.

R@1 on unseen rendered cities against epochs and seconds, from random batches, from Sample4Geo's with random access to
everything in its own order of work, and from streamed plans that are prepared beside the training: same model, same
steps, several seeds. A seed changes cities and training alike, so the comparisons are of differences within a seed.
The spread is the standard error of a mean difference, from the variance of the differences over the seeds, pooled over
the three pairs of contestants, because a few seeds say little about one pair's. It is one standard error and no more:
a rule of thumb, not a test.

Contestants run as fresh processes, one torch thread each, one after the other, each with all cores, and in rotating
order. About two hours on two cores; with ``--keep FOLDER`` a measurement that was cut off goes on behind the last
finished contestant.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # there may be no screen
import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

from tests.benchmarks.contest import found, measure, standard_error, subtract, table, told
from tests.benchmarks.measure import Failed, Result, figure, machine
from tests.benchmarks.payoff_city import SIZES, prepare
from tests.benchmarks.payoff_run import CONTESTANTS, Job

LABELS = {
    "random": "random batches",
    "random_access": "Sample4Geo, random access",
    "streamed": "geostream, streamed",
}
COLOURS = {"random": "#777777", "random_access": "#c8651b", "streamed": "#2563a6"}
RULE = "mean over the seeds; spread: the standard error of a mean paired difference, pooled over the three pairs"
EQUAL_SECONDS = ", when the fastest contestant of the seed had ended"


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.benchmarks.payoff", description=__doc__.split("\n")[0])
    arguments.add_argument("--json", type=Path, required=True, help="where the result goes; a picture beside it (.png)")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    arguments.add_argument("--epochs", type=int, default=9)
    arguments.add_argument("--size", choices=SIZES, default="full", help="of the cities")
    arguments.add_argument("--batch-size", type=int, default=32)
    arguments.add_argument("--jobs", type=int, default=1, help="contestants at once (default %(default)s)")
    arguments.add_argument("--keep", type=Path, metavar="FOLDER", help="keeps what is measured, and goes on with it")
    options = arguments.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no contestant is left running
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="geostream-payoff-") as scratch:
        try:
            result = benchmark(options.keep or Path(scratch), options, console)
        except Failed as error:
            console.print(str(error), markup=False)
            return 1
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    draw(result["contestants"], options.json.with_suffix(".png"))
    console.print(table(result["figures"]))
    return 0


def benchmark(folder: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    size, names = SIZES[options.size], list(CONTESTANTS)
    folder = folder.resolve()
    cities, jobs = {}, []
    for at, seed in enumerate(sorted(set(options.seeds))):
        home = folder / f"{options.size}-seed-{seed}"
        home.mkdir(parents=True, exist_ok=True)
        cities[seed] = prepare(home, size, seed, options.jobs)
        console.print(f"cities of seed {seed}: {cities[seed]}", highlight=False)
        for name in names[at % len(names) :] + names[: at % len(names)]:
            store, out = str(home / name), str(home / f"{name}.json")
            jobs.append(Job(name, seed, options.size, options.epochs, options.batch_size, store, out))
    measure([job for job in jobs if found(job) is None], "tests.benchmarks.payoff_run", options.jobs, console)
    runs: dict[str, list[Result]] = {name: [] for name in names}
    for job in jobs:
        result = found(job)
        if result is None:
            raise Failed(f"{job.out}: not there, though its contestant ended well")
        runs[job.contestant].append(result)
    return {
        "figures": figures(runs),
        "contestants": runs,
        "machine": machine(),
        "data": {"size": options.size, "cities": cities, "jobs": options.jobs},
    }


def figures(runs: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """What the benchmark is for. ``runs``: each contestant's results, all in the same order of seeds.

    Differences have no spread with one seed, and are left away.
    """
    made: dict[str, Any] = {}
    for suffix, addition, r1, gains in (
        ("", "", final_r1(runs), {"random_access": None, "random": 0.03}),
        ("_at_equal_seconds", EQUAL_SECONDS, equal_seconds(runs), {"random_access": 0.02, "random": 0.02}),
    ):
        for name, values in r1.items():
            made[f"r1_{name}{suffix}"] = told(values)
        if len(values) < 2:
            continue
        error = standard_error([subtract(r1[a], r1[b]) for a, b in combinations(r1, 2)])
        for other, gain in gains.items():
            bound = -error if gain is None else gain
            by_seed = subtract(r1["streamed"], r1[other])
            made[f"streamed_vs_{other}{suffix}"] = {
                **figure(by_seed, f">= {bound:.5f}", statistics.mean(by_seed)),
                "standard_error": error,
                "by_seed": by_seed,
                "rule": f"R@1 of streamed less that of {other}{addition}; {RULE}",
            }
        made[f"random_access_vs_random{suffix}"] = told(subtract(r1["random_access"], r1["random"]))
    return made


def final_r1(runs: Mapping[str, Sequence[Result]]) -> dict[str, list[float]]:
    return {name: [result["curve"][-1]["r1"] for result in results] for name, results in runs.items()}


def equal_seconds(runs: Mapping[str, Sequence[Result]]) -> dict[str, list[float]]:
    """R@1, between two evaluations on the line between them, at the second when the seed's fastest contestant ended."""
    ends = [[result["curve"][-1]["seconds"] for result in results] for results in runs.values()]
    until = np.min(ends, axis=0).tolist()

    def at(result: Result, second: float) -> float:
        curve = result["curve"]
        return float(np.interp(second, [0, *(p["seconds"] for p in curve)], [0, *(p["r1"] for p in curve)]))

    return {name: [at(*one) for one in zip(results, until, strict=True)] for name, results in runs.items()}


def draw(runs: Mapping[str, Sequence[Result]], path: Path) -> None:
    """R@1 against epochs and against seconds: mean of the seeds, and a band from the least to the most."""
    picture, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for name, results in runs.items():
        r1, *clocks = (
            np.array([[point[key] for point in result["curve"]] for result in results])
            for key in ("r1", "epoch", "seconds")
        )
        for ax, clock in zip(axes, clocks, strict=True):
            x = clock.mean(axis=0)
            ax.plot(x, r1.mean(axis=0), color=COLOURS[name], label=LABELS[name], marker=".")
            ax.fill_between(x, r1.min(axis=0), r1.max(axis=0), color=COLOURS[name], alpha=0.15, linewidth=0)
    axes[0].set(xlabel="epochs", ylabel="R@1 on unseen cities")
    axes[1].set(xlabel="seconds, evaluation not counted (mean of the seeds)")
    axes[0].legend(loc="lower right")
    for ax in axes:
        ax.grid(alpha=0.3)
    picture.savefig(path, dpi=130)
    plt.close(picture)


if __name__ == "__main__":
    sys.exit(main())
