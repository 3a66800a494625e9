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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geostream.settings import TrainSettings, default_settings, make_settings
from tests.benchmarks.contest import train_and_tell
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


if __name__ == "__main__":
    train_and_tell(Job(**json.loads(Path(sys.argv[1]).read_text())))
