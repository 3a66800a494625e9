"""One contestant of the recipe benchmark, once, in a process of its own: ``python -m tests.benchmarks.recipe_run JOB``.

Decides what is compared: a present recipe, and changes of it. Every change is a row of the table below: what it sets
on top of which recipe, or whether it averages similarities at the end, and where the idea is from. A setting that the
product does not have is refused by the product itself, before anything is measured.

There are two present recipes, because no network that a core trains in minutes comes with pretrained weights:

- ``present`` is the recipe of the rendered cities, with a network of 0.2 million parameters. It begins from weights
  that were trained on easy cities first. Without any it learns hardly anything on the hard ones in this time.
- ``imagenet`` is the same with EfficientNet-Lite0 and its real ImageNet weights, for what is about these. A step takes
  ten times as long, so it is fewer epochs.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from geostream.layout import open_layout
from geostream.report.evaluation_page import evaluate_checkpoint
from geostream.runs.run import Run
from geostream.settings import TrainSettings, default_settings, make_settings
from geostream.store import Store
from geostream.training.field_of_view import WHOLE
from tests.benchmarks.contest import train_and_tell
from tests.benchmarks.measure import Result
from tests.benchmarks.payoff_city import DATASET
from tests.benchmarks.recipe_city import SIZES

FIRST = "first_weights"  # the job that makes them, and no contestant
PRESENT, IMAGENET, ALL = "present", "imagenet", "all"
PRESENTS = (PRESENT, IMAGENET)
IMAGENET_EPOCHS = 1 / 6  # of those of the small network
# On top of the recipe of the rendered cities.
REGIME: dict[str, Any] = {
    "learning_rate": 2e-3,
    "first_mining": 1,
    "mine_every": 2,
    "prefetch": 1,  # a batch is more than half a per cent of these small epochs
}
LITE0: dict[str, Any] = {"model": "efficientnet_lite0", "model_options": {}, "learning_rate": 5e-4}


class Change(NamedTuple):
    """Settings on top of a present recipe, where the idea is from, and whether similarities are averaged at the end."""

    settings: dict[str, Any]
    source: str
    of: str = PRESENT
    tta: bool = False


CHANGES: dict[str, Change] = {
    "no_smoothing": Change({"label_smoothing": 0.0}, "what Sample4Geo's 0.1 is worth (Deuser et al., ICCV 2023)"),
    "ema": Change({"ema_decay": 0.99}, "weights averaged over steps (Tarvainen and Valpola, NeurIPS 2017)"),
    "no_decay_on_norms": Change({"decay_all": False}, "as ConvNeXt is trained (Liu et al., CVPR 2022)"),
    "decoupled": Change({"decoupled": True}, "the positive left out of its denominator (Yeh et al., ECCV 2022)"),
    "negative_radius": Change({"negative_radius": 55.0}, "near tiles are no negatives (Fervers et al., ECCV 2024)"),
    "soft_targets": Change({"soft_targets": 30.0}, "near tiles are half right (as in PIGEON, CVPR 2024)"),
    "positive_margin": Change({"positive_margin": 0.95}, "likely false negatives are dropped (NV-Retriever, 2024)"),
    "birds_eye": Change({"birds_eye": 40.0}, "panoramas seen from above, too (EP-BEV, ECCV 2024)"),
    "tta": Change({}, "similarities averaged over flips and turns, which the network was trained with", tta=True),
    "fov": Change({"fov": (180.0, 360.0)}, "crops with a random heading (ConGeo, ECCV 2024; SinGeo, CVPR 2026)"),
    "random_batches": Change({"strategy": "random"}, "what hard negatives are worth (Deuser et al., ICCV 2023)"),
    "layer_decay": Change({"layer_decay": 0.8}, "low layers learn slowly (as DINOv3 is fine-tuned, 2025)", IMAGENET),
    "frozen_stages": Change({"frozen_stages": 2}, "low layers keep their weights (VICI challenge, 2025)", IMAGENET),
    "imagenet_scratch": Change({"weights": "scratch"}, "what ImageNet is worth (VICI challenge, 2025)", IMAGENET),
}
#: Names of the changes that are kept; ``all`` sets those of ``present``.
KEPT: tuple[str, ...] = ("ema", "decoupled", "tta")


def change_of(contestant: str) -> Change:
    """What a contestant sets on top of which present recipe; KeyError where there is none of the name."""
    if contestant in PRESENTS:
        return Change({}, "", contestant)
    if contestant == ALL:
        kept = [name for name in KEPT if CHANGES[name].of == PRESENT]
        together = {setting: value for name in kept for setting, value in CHANGES[name].settings.items()}
        return Change(together, f"{', '.join(kept)} together", tta=any(CHANGES[name].tta for name in kept))
    return CHANGES[contestant]


def trained_as(contestant: str) -> str:
    """The contestant whose training is measured: the present recipe's where only the evaluation changes."""
    change = change_of(contestant)
    return contestant if change.settings else change.of


@dataclass(frozen=True)
class Job:
    """All that a contestant is told."""

    contestant: str
    seed: int
    size: str
    weights: str  # folder of the files that training begins from
    store: str  # local folder: the contestant's own copy of the cities
    out: str  # the file that its result is written to

    @property
    def settings(self) -> TrainSettings:
        size = SIZES[self.size]
        made = default_settings(DATASET).flat() | REGIME
        made |= {"batch_size": size.batch_size, "resident_shards": size.resident_shards, "seed": self.seed}
        if self.contestant == FIRST:
            return make_settings(
                made | {"epochs": size.easy_epochs, "evaluate_every": size.easy_epochs, "mine_every": 3}
            )
        change, epochs = change_of(self.contestant), size.epochs
        if change.of == IMAGENET:
            made, epochs = made | LITE0, max(1, int(IMAGENET_EPOCHS * epochs))
        made |= {"weights": str(weights_file(self.weights, change.of))}
        return make_settings(made | {"epochs": epochs, "evaluate_every": epochs} | change.settings)


def weights_file(folder: str, present: str) -> Path:
    """The file that contestants of a present recipe begin from."""
    return Path(folder) / ("efficientnet_lite0.pth" if present == IMAGENET else "first.safetensors")


def averaged(job: Job) -> Result:
    """Evaluate the job's last checkpoint once more, with similarities averaged over flips and turns."""
    store = Store.open(job.store)
    run = Run.open(store, open_layout(store, DATASET), job.contestant)
    return {"tta": evaluate_checkpoint(run, fovs=[WHOLE], tta=True)[-1]}


def keep_weights(job: Job) -> Result:
    """Copy the weights of the job's last checkpoint to where the contestants look for them; nothing is added."""
    store = Store.open(job.store)
    newest = Run(store, open_layout(store, DATASET), job.contestant).checkpoints()[-1]
    found = next(Path(job.store).glob(f"{DATASET}/runs/{job.contestant}/checkpoints/{newest}/model.safetensors"))
    partial = Path(job.out).with_suffix(".weights")
    shutil.copyfile(found, partial)
    partial.rename(weights_file(job.weights, PRESENT))
    return {}


if __name__ == "__main__":
    the_job = Job(**json.loads(Path(sys.argv[1]).read_text()))
    train_and_tell(the_job, keep_weights if the_job.contestant == FIRST else averaged)
