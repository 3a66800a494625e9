"""What a warm start saves: ``python -m tests.benchmarks.warm --json PATH``.

Rendered cities in two layouts: week 1, and week 2 with two more cities. A run is trained from scratch on week 1 and
promoted. Then week 2 is trained twice, from scratch and from the current model with the shorter schedule of
``warm_settings``. Wanted: the warm run reaches the recall of the one from scratch in at most 0.4 of its seconds. Both
are measured on the same test cities, and compared as a promotion would. The share is that of processor seconds, which
other work on the machine does not change. About three minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.rendered import shard_options
from geostream.layout import Layout, open_layout
from geostream.runs.loop import train
from geostream.runs.promotion import decide, promote_if_no_worse
from geostream.runs.run import Run
from geostream.settings import TrainSettings, default_settings, warm_settings
from geostream.store import Store
from sharding import ShardOptions, read_places, shard
from sharding.simcity import CitySpec, render_cities

DATASET = "simcity"
WEEKS = {"week1": 8, "week2": 10}  # cities to train on
TEST_CITIES = 3


def main() -> None:
    arguments = argparse.ArgumentParser(prog="python -m tests.benchmarks.warm", description=__doc__.split("\n")[0])
    arguments.add_argument("--json", type=Path, required=True, help="where the result goes")
    arguments.add_argument("--side", type=int, default=16, help="rows and columns of each city; default %(default)s")
    arguments.add_argument(
        "--rates", type=float, nargs="*", default=[], help="other shares of the learning rate to try"
    )
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="geostream-warm-") as scratch:
        result = benchmark(Path(scratch), options.side, options.rates)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    table = Table(title="week 2")
    for name in result["rows"][0]:
        table.add_column(name)
    for row in result["rows"]:
        table.add_row(*map(str, row.values()))
    Console().print(table)


def benchmark(folder: Path, side: int, rates: list[float]) -> dict[str, Any]:
    """Render, train and compare; a row for each training of week 2, with its share of the first one's seconds."""
    store = Store.open(folder / "store")
    layouts = prepare(folder / "raw", store, side)
    recipe = default_settings(DATASET)
    train(store, layouts["week1"], "week1", recipe)
    promote_if_no_worse(Run.open(store, layouts["week1"], "week1"))
    warm = warm_settings(recipe, DATASET)
    trials = {"scratch": recipe, "warm": warm}
    trials |= {f"warm-{n}": warm.changed(learning_rate=recipe.optim.learning_rate * r) for n, r in enumerate(rates)}
    rows: list[dict[str, Any]] = []
    for name, settings in trials.items():
        rows.append(trial(store, layouts["week2"], name, settings, rows[0]["processor seconds"] if rows else None))
    return {"pairs": {name: len(layout.pairs("train")) for name, layout in layouts.items()}, "rows": rows}


def trial(store: Store, layout: Layout, name: str, settings: TrainSettings, scratch: float | None) -> dict[str, Any]:
    """Train once; the recall after each evaluation, the seconds, and how the current model compares."""
    started, spent = time.perf_counter(), _processor_seconds()
    result = train(store, layout, name, settings)
    seconds, spent = time.perf_counter() - started, _processor_seconds() - spent
    decision = decide(Run.open(store, layout, name))
    assert decision.comparison is not None
    r1 = decision.comparison.metrics[0]
    return {
        "run": name,
        "epochs": settings.optim.epochs,
        "learning rate": settings.optim.learning_rate,
        "seconds": round(seconds, 1),
        "processor seconds": round(spent, 1),
        "share": round(spent / scratch, 3) if scratch else 1.0,
        "R@1": round(r1.new, 4),
        "current model's": round(r1.old, 4),
        "standard error": round(r1.standard_error, 4),
        "by epoch": [round(evaluation["r1"], 3) for evaluation in result.evaluations],
    }


def _processor_seconds() -> float:
    """Return the seconds that this process, and those of its children that have ended, have computed."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def prepare(raw: Path, store: Store, side: int) -> dict[str, Layout]:
    """Render the cities, and shard them into a layout a week."""
    train_cities = [CitySpec(f"Train{n:02d}", side, side) for n in range(max(WEEKS.values()))]
    test_cities = [CitySpec(f"Test{n:02d}", side, side) for n in range(TEST_CITIES)]
    kind = {"max_offset": 0.1, "empty_share": 0.0, "extra_view_share": 0.0}
    render_cities(raw, train_cities + test_cities, seed=0, tile_size=48, view_size=(32, 128), **kind)  # type: ignore[arg-type]
    made = {}
    for name, count in WEEKS.items():
        cities = {"train_cities": [c.name for c in train_cities[:count]], "test_cities": [c.name for c in test_cities]}
        options = ShardOptions(**shard_options("vigor"))
        shard(read_places("vigor", raw, **cities), store, DATASET, name, options=options)
        made[name] = open_layout(store, DATASET, name)
    return made


if __name__ == "__main__":  # sharding uses processes, which import this file
    main()
