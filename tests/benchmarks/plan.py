"""How hard, how new and how cheap to read the plans of every strategy are; and how fast planning is.

Plans of consecutive epochs are made by the product's own functions (embeddings in Zarr, neighbour graph, similarity
order, ``make_plan``) on layouts whose index says what images of the field's size would take; only the images are not
there. The four figures of a plan are the worst of all epochs but the first, which has none before it to be unlike
(its score counts). Speed and memory are those of ``make_plan`` whole, two reference plans and the schedule included, in
a process of its own on one core; seconds of that core, because others use the machine.

    python -m tests.benchmarks.plan --json PATH [--seed 0] [--quick]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from geostream.layout import Layout
from geostream.mining.embeddings import Embeddings
from geostream.mining.graph import NeighbourGraph
from geostream.mining.visual import build_visual_graph
from geostream.planning.make_plan import make_plan
from geostream.planning.plan import EpochPlan
from geostream.reclustering.recluster import order_places
from geostream.settings import TrainSettings
from geostream.store import Store
from tests.benchmarks.index_only import commit_index, members_of
from tests.benchmarks.measure import figure, machine, run
from tests.benchmarks.plan_places import Places, many_views, rendered, synthetic, write_embeddings

EPOCHS = 6
WANTED = {
    "hardness_score": (">= 1.0", min),
    "overlap": ("<= 0.10", max),
    "resident_share": ("<= 0.05", max),
    "amplification": ("<= 1.05", max),
}
Row = dict[str, Any]


class Case:
    """Places with their graph, in a first generation by geography and in the next by similarity, for ``settings``."""

    def __init__(
        self, store: Store, places: Places, per_shard: float, settings: TrainSettings, seed: int, k: int = 128
    ) -> None:
        members = members_of(places.views, seed)
        shards = max(1, round(len(places.views) / per_shard))
        cuts = np.linspace(0, len(places.order), shards + 1).astype(int)[1:-1]
        run = store.child("run")
        self.first = commit_index(
            store, "base", places.table, members, np.split(places.order, cuts), coordinates=places.coordinates
        )
        self.embeddings: Embeddings = write_embeddings(run, self.first, places)
        self.graph: NeighbourGraph = build_visual_graph(run, "neighbours/visual.zarr", self.first, self.embeddings, k)
        order = order_places(self.first, self.embeddings, self.graph, settings).shards
        self.clustered = commit_index(
            store, "base-g1", places.table, members, order, coordinates=places.coordinates, parent=self.first
        )

    def plans(self, layout: Layout, settings: TrainSettings, epochs: int = EPOCHS) -> list[Row]:
        """The quality of the plans of consecutive epochs."""
        made: list[EpochPlan] = []
        for epoch in range(1, epochs + 1):
            plan = make_plan(layout, self.graph, settings, epoch, settings.seed, made[:2], self.embeddings)
            plan.validate(layout)
            made.insert(0, plan)
        return [dict(plan.quality) for plan in reversed(made)]


def table(case: Case, batch_size: int, windows: list[int], epochs: int = EPOCHS) -> list[Row]:
    """Every strategy on either generation, by the number of resident shards; the first of ``windows`` is judged."""
    rows = []
    judged, everything = windows[0], len(case.first.shard_names)
    choices = {
        "geographic": [
            ("patchwork", judged),
            ("sample4geo", judged),
            ("sample4geo", everything),
            ("random", everything),
        ],
        "similarity": [*(("patchwork", w) for w in windows), ("sample4geo", judged)],
    }
    for generation, layout in (("geographic", case.first), ("similarity", case.clustered)):
        for strategy, resident in choices[generation]:
            settings = TrainSettings().changed(
                batch_size=batch_size, strategy=strategy, resident_shards=resident, look_ahead=10**6
            )
            plans = case.plans(layout, settings, epochs)
            row = {"order": generation, "strategy": strategy, "batch": batch_size, "resident_shards": resident}
            rows.append(row | {"epochs": plans} | worst(plans))
            say(rows[-1])
    return rows


def worst(plans: list[Row]) -> Row:
    return {name: pick(_known(plans, name), default=None) for name, (_, pick) in WANTED.items()}


def _known(plans: list[Row], name: str) -> list[float]:
    return [plan[name] for plan in plans if plan[name] is not None]


def say(row: Row) -> None:
    numbers = "  ".join(f"{name} {value:.3f}" for name in WANTED if (value := row[name]) is not None)
    what = f"{row['order']:>10} {row['strategy']:>10}  batch {row['batch']}  W {row['resident_shards']:>4}"
    print(f"{what}  {numbers}", flush=True)


def figures(name: str, rows: list[Row], resident: int) -> Row:
    """Those wanted, of patchwork on the clustered layout."""
    [row] = [
        r for r in rows if (r["order"], r["strategy"], r["resident_shards"]) == ("similarity", "patchwork", resident)
    ]
    made = {}
    for what, (wanted, _) in WANTED.items():
        values = _known(row["epochs"], what)
        made[f"{name}_{what}"] = figure(values, wanted, row[what])
    return made


def speed(n: int) -> Row:
    """Plan ``n`` pairs in a process of its own, on one core."""
    core = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "--cpu-list", core, sys.executable, "-m", "tests.benchmarks.plan_speed", str(n)]
    return {"pairs": n} | run(command, os.environ)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, help="folder for the rendered city, which a further run finds trained there"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the places, no trained city: does it work?")
    arguments = parser.parse_args()
    scale = 10 if arguments.quick else 1
    result: Row = {"machine": machine(), "seed": arguments.seed, "tables": {}, "figures": {}}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        cases = {
            "mixed": (synthetic("mixed", 48_000 // scale, arguments.seed), 240 / scale, 128, [8, 4, 16], 8),
            "types": (synthetic("types", 48_000 // scale, arguments.seed), 240 / scale, 128, [8, 4, 16], 8),
        }
        if not arguments.quick:
            city = rendered((arguments.keep or root) / "city", arguments.seed)
            cases["rendered_32"] = (city, len(city.views) / 100, 32, [4, 8], 4)
            cases["rendered_128"] = (city, len(city.views) / 100, 128, [4, 8], 4)
        for name, (places, per_shard, batch_size, windows, judged) in cases.items():
            print(f"{name}: {len(places.views)} places")
            settings = TrainSettings().changed(batch_size=batch_size, resident_shards=judged)
            case = Case(Store.open(root / name), places, per_shard, settings, arguments.seed)
            rows = table(case, batch_size, windows)
            result["tables"][name] = rows
            result["figures"] |= figures(name, rows, judged)
        print("many_views: 701 places, 54 views each")
        settings = TrainSettings().changed(batch_size=128, resident_shards=8)
        case = Case(Store.open(root / "many"), many_views(arguments.seed), 12, settings, arguments.seed)
        result["tables"]["many_views"] = table(case, 128, [8, 16], epochs=3)
    speeds = [speed(n // scale) for n in (250_000, 500_000, 1_000_000)]
    result["speed"] = speeds
    per_minute = [60 * s["pairs"] / s["cpu_seconds"] for s in speeds]
    growth = [
        float(np.log(b["held_bytes"] / a["held_bytes"]) / np.log(b["pairs"] / a["pairs"])) for a, b in pairwise(speeds)
    ]
    result["figures"]["pairs_per_minute"] = figure(per_minute, ">= 1e6", per_minute[-1])
    result["figures"]["memory_growth"] = figure(growth, "<= 1.1", growth[-1])
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    for name, one in result["figures"].items():
        print(f"{name}: {one['value']:.4g} (wanted {one['wanted']}, {'met' if one['met'] else 'NOT met'})")


if __name__ == "__main__":
    main()
