"""Runs with a checkpoint that nothing was trained for, and registries of models that name runs."""

from __future__ import annotations

from dataclasses import asdict

import torch

from geostream.layout import Layout
from geostream.runs.models import FORMAT, PROMOTED, Model
from geostream.runs.run import Run
from geostream.runs.stages import new_encoder
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.training.checkpoint import save_checkpoint
from geostream.training.checkpoint_files import Position
from geostream.training.distributed import ProcessGroup
from geostream.training.step import TrainStep
from tests.training.settings import TINY


def run_with_checkpoint(
    store: Store, layout: Layout, name: str, *, seed: int = 0, blind: bool = False, settings: TrainSettings = TINY
) -> tuple[Run, str]:
    """A run with one checkpoint, at the end of epoch 3, and its name. A blind network gives all images one vector."""
    run, settings = Run(store, layout, name), settings.changed(seed=seed)
    run.store_settings(settings)
    run.pin_layout(layout)
    encoder = new_encoder(settings)
    if blind:
        with torch.no_grad():
            for parameter in encoder.network.parameters():
                parameter.zero_()
    position = Position(layout.id, layout.places_id, epoch=3, plan="", cursor=0, step=30, finished=True)
    checkpoint = save_checkpoint(run.folder, TrainStep(encoder, settings, ProcessGroup()), position)
    run.folder.write_json("best.json", {"checkpoint": checkpoint, "epoch": 3, "r1": 0.5})
    return run, checkpoint


def write_models(models: Store, made: list[tuple[str, str]], current: list[int]) -> None:
    """Write a registry of models, each from (run, id of its layout); ``current``: the numbers that were promoted."""
    documents = [
        asdict(Model(number, run, "step-00000001", 1, {"name": "base", "id": of}, None, {}, {}, None, "", "run", 0))
        for number, (run, of) in enumerate(made, start=1)
    ]
    for one in documents:
        models.write_json(f"{one['number']:04d}.json", one | {"format": FORMAT})
    history = [{"number": number, "what": PROMOTED} for number in current]
    newest = documents[current[-1] - 1]
    models.write_json("current.json", {"format": FORMAT, "number": current[-1], "model": newest, "history": history})
