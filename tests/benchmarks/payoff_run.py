"""One contestant of the payoff benchmark, once, in a process of its own: ``python -m tests.benchmarks.payoff_run JOB``.

Decides what is compared: the product's own training run, with settings that differ in nothing but the plan. ``random``
draws its batches; ``random_access`` is Sample4Geo's assembly with everything resident, GPS neighbours first and then
what the model finds similar; ``streamed`` is the product's plans with 5 % of the shards resident. It asks for batches
a tenth harder than random access gives: these cities' first order allows about as hard ones (0.98 to 1.05) without a
reclustering, so at the defaults, whether there is one would be left to chance.
The clock is the sum of the run's records, but those of evaluation, which is the same for all, and of what happened
beside the training: a wait for that is a record of its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geostream.layout import open_layout
from geostream.runs.log import Record
from geostream.runs.loop import train
from geostream.settings import TrainSettings, default_settings, make_settings
from geostream.store import Store
from tests.benchmarks.payoff_city import DATASET, SIZES, TILE, VIEW

EVERYTHING = 100_000  # shards: more than there are
# On top of the recipe for rendered cities.
REGIME: dict[str, Any] = {
    "tile_size": TILE[0],
    "view_height": VIEW[0],
    "view_width": VIEW[1],
    "learning_rate": 2e-3,
    "schedule": "one-cycle",
    "first_mining": 3,
    "mine_every": 3,
    "evaluate_every": 3,
    "threads": 1,
    "decode_threads": 1,
    "prefetch": 1,  # a batch is more than half a per cent of these small epochs
}
# Sample4Geo's own order of work: embed, mine and plan between two epochs. Streamed: all of it beside the training.
CONTESTANTS: dict[str, dict[str, Any]] = {
    "random": {"strategy": "random", "resident_shards": EVERYTHING, "recluster_below": 0},
    "random_access": {
        "strategy": "sample4geo",
        "resident_shards": EVERYTHING,
        "recluster_below": 0,
        "mining_lag": 0,
    },
    "streamed": {"hardness": 1.1, "recluster_below": 1.1, "mine_every": 1},
}
PLAN = ("epoch", "source", "hardness_score", "hardness_note", "overlap", "resident_share", "amplification")

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """All that a contestant is told."""

    contestant: str
    seed: int
    size: str
    epochs: int
    batch_size: int
    store: str  # local folder: the contestant's own copy of the cities
    out: str  # the file that its result is written to

    @property
    def settings(self) -> TrainSettings:
        streamed = {"resident_shards": SIZES[self.size].resident_shards}
        own = {"epochs": self.epochs, "batch_size": self.batch_size, "seed": self.seed}
        recipe = default_settings(DATASET).flat()
        return make_settings(recipe | REGIME | streamed | CONTESTANTS[self.contestant] | own)


def main(path: str) -> None:
    job = Job(**json.loads(Path(path).read_text()))
    store = Store.open(job.store)
    records: list[Record] = []
    spent = time.process_time()

    def record(one: Record) -> None:
        nonlocal spent
        before, spent = spent, time.process_time()
        records.append(one | {"cpu_seconds": spent - before})

    train(store, open_layout(store, DATASET), job.contestant, job.settings, on_record=record)
    # The store belongs to the job's folder and says nothing of what was measured.
    what = {name: value for name, value in asdict(job).items() if name not in ("store", "out")}
    result = what | {"settings": job.settings.model_dump()} | story(records)
    partial = Path(job.out).with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1))
    partial.rename(job.out)


def story(records: Sequence[Record]) -> Result:
    """What a run's records, in the order in which they were written, come to.

    ``curve``: R@1 at each evaluation, with the seconds of wall and of the trainer's process that went into all stages
    before it; earlier evaluations are left out, and what happened beside the training. ``peak_resident_bytes``: most
    that the reader held, what it fetched early included.
    """
    curve: list[dict[str, float]] = []
    seconds: dict[str, float] = {}
    cpu: dict[str, float] = {}
    for one in records:
        stage = one["stage"]
        if one.get("beside"):  # it passed while the trainer trained
            continue
        if stage == "evaluate":
            so_far = {"seconds": sum(seconds.values()), "cpu_seconds": sum(cpu.values())}
            curve.append({"epoch": one["epoch"], **so_far, "r1": one["r1"]})
        else:
            seconds[stage] = seconds.get(stage, 0.0) + one["seconds"]
            cpu[stage] = cpu.get(stage, 0.0) + one["cpu_seconds"]
    training = [one for one in records if one["stage"] == "train"]
    return {
        "curve": curve,
        "steps": max(one["step"] for one in training),
        "peak_resident_bytes": max(one["stream"]["peak_resident_bytes"] for one in training),
        "seconds_by_stage": seconds,
        "cpu_seconds_by_stage": cpu,
        "plans": [{name: one.get(name) for name in PLAN} for one in records if one["stage"] == "plan"],
        "reclusterings": [one for one in records if one["stage"] == "recluster"],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
