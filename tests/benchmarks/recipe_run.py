"""One contestant of the recipe benchmark, once, in a process of its own: ``python -m tests.benchmarks.recipe_run JOB``.

Decides what is compared: VIGOR's present recipe, shortened so that a run takes minutes of one core, and changes of it.
Every change is a row of the table below: what it sets, and where the idea is from. A setting that the product does not
have is refused by the product itself, before anything is measured.

The network is small, but begins from real ImageNet weights, because several changes are about fine-tuning.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from geostream.settings import TrainSettings, default_settings, make_settings
from tests.benchmarks.contest import train_and_tell
from tests.benchmarks.recipe_city import SIZES

# On top of VIGOR's recipe: what makes it short.
REGIME: dict[str, Any] = {
    "model": "efficientnet_lite0",
    "tile_size": 48,
    "view_height": 32,
    "view_width": 128,
    "epochs": 4,
    "batch_size": 32,
    "warmup_epochs": 0.25,
    "neighbours": 64,
    "first_mining": 1,
    "mine_every": 1,
    "threads": 1,
    "decode_threads": 1,
    "prefetch": 1,
}


class Change(NamedTuple):
    """Settings on top of the present recipe, and where the idea is from."""

    settings: dict[str, Any]
    source: str


PRESENT, ALL = "present", "all"
CHANGES: dict[str, Change] = {
    "no_smoothing": Change({"label_smoothing": 0.0}, "what Sample4Geo's 0.1 is worth (Deuser et al., ICCV 2023)"),
    "ema": Change({"ema_decay": 0.99}, "weights averaged over steps (Tarvainen and Valpola, NeurIPS 2017)"),
    "no_decay_on_norms": Change({"decay_all": False}, "as ConvNeXt is trained (Liu et al., CVPR 2022)"),
    "lower_rate": Change({"learning_rate": 3e-4}, "pretrained encoders want less than 1e-3 (VICI challenge, 2025)"),
    "fov": Change({"fov": (180.0, 360.0)}, "crops with a random heading (ConGeo, ECCV 2024; SinGeo, CVPR 2026)"),
    "random_batches": Change({"strategy": "random"}, "what hard negatives are worth (Deuser et al., ICCV 2023)"),
    "scratch": Change({"weights": "scratch"}, "what pretraining is worth"),
}
KEPT: tuple[str, ...] = ()  # names of the changes that ``all`` sets together


def overrides(contestant: str) -> dict[str, Any]:
    """Settings of a contestant on top of the present recipe; KeyError where there is none of the name."""
    if contestant == PRESENT:
        return {}
    if contestant == ALL:
        return {name: value for change in KEPT for name, value in CHANGES[change].settings.items()}
    return CHANGES[contestant].settings


@dataclass(frozen=True)
class Job:
    """All that a contestant is told."""

    contestant: str
    seed: int
    size: str
    weights: str  # file that training begins from
    store: str  # local folder: the contestant's own copy of the cities
    out: str  # the file that its result is written to

    @property
    def settings(self) -> TrainSettings:
        size = SIZES[self.size]
        short = REGIME | {"resident_shards": size.resident_shards, "weights": self.weights, "seed": self.seed}
        short |= {"epochs": size.epochs, "evaluate_every": size.epochs}
        return make_settings(default_settings("vigor").flat() | short | overrides(self.contestant))


if __name__ == "__main__":
    train_and_tell(Job(**json.loads(Path(sys.argv[1]).read_text())))
