"""Training speed, and how long it waits for data: ``python -m tests.benchmarks.train --json PATH``.

ConvNeXt-B at VIGOR's sizes with batches of 128, by VIGOR's recipe, streamed from a real S3 server on this machine. The
images are noise of realistic size in bytes, made by nobody's camera and written by the product's own writer. One epoch
warms up, the others are measured whole: the wait for an epoch's first batch counts. Each repeat is a fresh process.
So that the batch fits one GPU, activations are recomputed (gradient checkpointing); that is a third more work.
Without a GPU there is nothing to measure: it says so and exits with 2, unless ``--tiny`` asks to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from geostream.layout import open_layout
from geostream.planning.make_plan import make_plan
from geostream.runs.stages import new_encoder
from geostream.settings import TrainSettings, default_settings, parse_settings
from geostream.store import Store
from geostream.training.distributed import ProcessGroup
from geostream.training.epoch import Epoch, measured
from geostream.training.step import TrainStep
from geostream.training.steps import EpochOutcome
from infra.s3 import local_s3
from sharding import ShardOptions, shard
from sharding.places import Place, RawDataset, RawImage, View
from tests.benchmarks.images import TILE, VIEW, make_pairs
from tests.benchmarks.measure import Failed, figure, machine, run, summary

DATASET = "bench"
PAIRS = 4352  # 34 batches an epoch
EPOCHS = 3  # measured, behind one to warm up
REPEATS = 3
WANTED_WAIT = "<= 0.03"
TINY = {"model": "test_convnext", "tile_size": 32, "view_height": 32, "view_width": 64, "batch_size": 8}
TINY_PAIRS = 64


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.benchmarks.train", description=__doc__.split("\n")[0])
    arguments.add_argument("--json", type=Path, required=True, help="where the result goes")
    arguments.add_argument("--pairs", type=int, help=f"pairs of images (default {PAIRS})")
    arguments.add_argument("--repeats", type=int, default=REPEATS, help="default %(default)s")
    arguments.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the training")
    arguments.add_argument("--local", action="store_true", help="stream from a local folder instead of S3")
    arguments.add_argument("--tiny", action="store_true", help="a small network and small images, on whatever is there")
    options = arguments.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print("train: no GPU here, nothing to measure; --tiny shows that it works", file=sys.stderr)
        return 2
    try:
        result = benchmark(settings_of(options.tiny, options.set), options)
    except Failed as error:
        print(error, file=sys.stderr)
        return 1
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")
    for name, values in result["summary"].items():
        print(f"{name}: {values['median']:.4g} ({values['min']:.4g} … {values['max']:.4g})", file=sys.stderr)
    return 0


def settings_of(tiny: bool, overrides: list[str]) -> TrainSettings:
    """VIGOR's recipe, but from scratch and in random batches: neither changes what a step costs."""
    changed = {"weights": "scratch", "strategy": "random", "gradient_checkpointing": True, "channels_last": True}
    return parse_settings(overrides, default_settings("vigor").changed(**changed | (TINY if tiny else {})))


def benchmark(settings: TrainSettings, options: argparse.Namespace) -> dict[str, Any]:
    """Write the images, train on them in fresh processes, and make the figures."""
    with (
        tempfile.TemporaryDirectory(prefix="geostream-bench-") as folder,
        _store(Path(folder), options.local) as (url, environment),
    ):
        pairs = options.pairs or (TINY_PAIRS if options.tiny else PAIRS)
        write_layout(Path(folder, "raw"), Store.open(url), pairs, settings)
        job = json.dumps({"url": url, "settings": settings.model_dump()})
        command = [sys.executable, "-m", "tests.benchmarks.train_run", job]
        repeats = [run(command, environment) for _ in range(options.repeats)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "benchmark": "train",
        "machine": machine() | {"device": device},
        "settings": settings.model_dump(),
        "tiny": options.tiny,
        "pairs": pairs,
        "figures": {"wait_share": figure([repeat["wait_share"] for repeat in repeats], WANTED_WAIT)},
        "summary": summary(repeats),
        "repeats": repeats,
    }


@contextmanager
def _store(folder: Path, local: bool) -> Iterator[tuple[str, dict[str, str]]]:
    """URL of an empty store, and the environment in which it can be reached; ours, too."""
    if local:
        yield str(folder / "store"), dict(os.environ)
        return
    with local_s3(folder / "s3") as server:
        os.environ.update(server.environment())
        yield f"{server.url}/train", dict(os.environ)


def write_layout(raw: Path, store: Store, pairs: int, settings: TrainSettings) -> None:
    """``pairs`` places of noise, each with one view, as the product stores them for these settings."""
    places = []
    for number, images in enumerate(make_pairs(raw.with_name("made"), pairs, 0, lambda: None)):
        named = []
        for kind, data in zip(("tile", "view"), images, strict=True):
            path = f"{kind}-{number:05d}.jpg"
            raw.mkdir(exist_ok=True)
            (raw / path).write_bytes(data)
            named.append(RawImage(path, "the benchmark"))
        places.append(
            Place(f"place-{number:05d}", "noise", ("train", "test"), named[0], views=(View(named[1], "train"),))
        )
    dataset = RawDataset("noise", raw, {}, "none", TILE, VIEW, tuple(places))
    sizes = (settings.model.tile_size,) * 2, (settings.model.view_height, settings.model.view_width)
    shard_bytes = 64 * 2**20 if sizes == (TILE, VIEW) else 2**14
    shard(dataset, store, DATASET, options=ShardOptions(*sizes, shard_bytes=shard_bytes))


def train(url: str, settings: TrainSettings) -> dict[str, Any]:
    """Train on the layout for one epoch and EPOCHS more; what the latter came to."""
    layout = open_layout(Store.open(url), DATASET)
    with ProcessGroup.current() as group:
        train_step = TrainStep(new_encoder(settings, group.device), settings, group)
        outcomes = [
            Epoch(train_step, layout, make_plan(layout, None, settings, epoch, 0), EpochOutcome(), None).train(
                lambda outcome, state: None, lambda: False
            )
            for epoch in range(1, EPOCHS + 2)
        ][1:]
    seconds = sum(outcome.seconds for outcome in outcomes)
    waited = sum(outcome.stream.stall_seconds for outcome in outcomes)
    return {
        "pairs_per_second": sum(outcome.pairs for outcome in outcomes) / seconds,
        "wait_share": waited / seconds,
        "steps": sum(outcome.steps for outcome in outcomes),
        "loss": outcomes[-1].loss,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "epochs": [measured(outcome) for outcome in outcomes],
    }


if __name__ == "__main__":
    sys.exit(main())
