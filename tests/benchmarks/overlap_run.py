"""One contestant of the overlap benchmark: ``python -m tests.benchmarks.overlap_run STORE CONTESTANT STEP EPOCHS``.

``learn`` trains the weights that others begin with; ``feed`` finds out how fast the loader can feed; ``beside`` and
``between`` train with steps that are waits of STEP seconds, with and without a lag; ``demo`` trains as the demo does;
``harvest`` keeps the vectors of its steps. The last line of output is the result as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

from geostream.layout import open_layout
from geostream.runs.log import RunResult
from geostream.runs.loop import train
from geostream.settings import TrainSettings, default_settings
from geostream.store import Store
from geostream.training.step import TrainStep
from tests.benchmarks.overlap import DATASET
from tests.benchmarks.overlap_harvest import harvest

FEEDS = 2  # times as fast as a step
LEARNT = "learnt"  # the run of ``learn``
#: On top of the demo's recipe: where a GPU would run the network, it must not take the core that the rest has.
SMALL: dict[str, Any] = {
    "model_options": {
        "ls_init_value": 1.0,
        "act_layer": "relu",
        "depths": [1, 1, 1, 1],
        "dims": [16, 16, 32, 32],
    }
}
#: Plans before the rewrite have a score of 0.6, those after it 0.93 and more: so there is one.
REGIME: dict[str, Any] = SMALL | {
    "weights": f"run:{LEARNT}",
    "first_mining": 1,
    "mine_every": 1,
    "recluster_below": 0.9,
    "evaluate_every": 1000,
    "prefetch": 8,
}


class Steps:
    """Steps of an optimizer that are waits of ``seconds`` each."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.count, self.pairs = seconds, 0, 0
        self.began = self.ended = self.spent = 0.0

    def step(self, train_step: TrainStep, batches: list[dict[str, Tensor]], rate: float) -> Tensor:
        """Wait, instead of training."""
        began = time.perf_counter()
        self.began = self.began or began
        time.sleep(self.seconds)
        self.ended = time.perf_counter()
        self.spent += self.ended - began
        self.count += 1
        self.pairs += sum(len(batch["pair"]) for batch in batches)
        train_step.steps += 1
        return torch.tensor(0.5)


def main(url: str, contestant: str, step: str, epochs: str) -> None:
    """Train, and print what it came to."""
    store, settings = Store.open(url), default_settings(DATASET)
    if contestant == "demo":
        print(json.dumps(of_the_demo(trained(store, settings))))
        return
    if contestant == "harvest":
        print(json.dumps({"epochs": harvest(store, settings.changed(epochs=int(epochs)))}))
        return
    if contestant == "learn":
        settings = settings.changed(**SMALL, epochs=int(epochs), mine_every=1000)
        print(json.dumps({"r1": trained(store, settings, LEARNT).evaluations[-1]["r1"]}))
        return
    steps = Steps(float(step))
    TrainStep.step = lambda *arguments: steps.step(*arguments)  # type: ignore[method-assign]
    settings = settings.changed(**REGIME, epochs=int(epochs), mining_lag=int(contestant == "beside"))
    if contestant == "feed":
        settings = settings.changed(decode_threads=2)
    result = trained(store, settings)
    wall = steps.ended - steps.began
    told = {
        "share": 1 - steps.spent / wall,
        "wall_seconds": wall,
        "step_seconds": FEEDS * wall / steps.count if contestant == "feed" else steps.seconds,
        "pairs": steps.pairs,
        "seconds": result.seconds,
        "beside": result.beside,
        "reclusterings": result.reclusterings,
    }
    print(json.dumps(told))


def trained(store: Store, settings: TrainSettings, name: str = "bench") -> RunResult:
    """Train a run on the store's cities."""
    return train(store, open_layout(store, DATASET), name, settings)


def of_the_demo(result: RunResult) -> dict[str, Any]:
    """Return what a run like the demo's came to; ``not_training_for_training`` leaves evaluation out."""
    others = sum(seconds for stage, seconds in result.seconds.items() if stage not in ("train", "evaluate"))
    return {
        "not_training_for_training": others / result.seconds["train"],
        "seconds": result.seconds,
        "beside": result.beside,
        "r1": result.evaluations[-1]["r1"],
        "reclusterings": result.reclusterings,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
