"""Batches of noise and a train step for them: what the tests of single steps share, in one or several processes."""

from __future__ import annotations

from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.training.distributed import ProcessGroup
from geostream.training.model import Encoder
from geostream.training.step import TrainStep
from geostream.training.targets import PairPlaces
from tests.cities import city

PLAIN = TrainSettings().changed(
    model="test_convnext",
    model_options={"ls_init_value": 1.0},  # timm's own of 1e-6 makes every block an identity
    tile_size=32,
    view_height=32,
    view_width=64,
    batch_size=6,
    color_jitter=0.0,
    jpeg_probability=0.0,
    blur_probability=0.0,
    dropout_probability=0.0,
)


def plain_settings(**changes: Any) -> TrainSettings:
    """Settings without augmentation, changed by name."""
    return PLAIN.changed(**changes)


def noise_batch(step: int, number: int, size: int = 6) -> dict[str, Tensor]:
    """Batch ``number`` of a step, as the loader makes them."""
    generator = torch.Generator().manual_seed(100 * step + number)
    images = {"view": (size, 3, 32, 64), "tile": (size, 3, 32, 32)}
    return {
        name: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for name, shape in images.items()
    } | {"pair": torch.arange(number * size, (number + 1) * size)}


@cache
def places_on_a_grid() -> PairPlaces:
    """The places of pairs 0 to 49: two areas of five by five, 35 m apart, with semi-positives across."""
    with TemporaryDirectory() as folder:
        return PairPlaces(city(Store.open(folder), side=5))


def new_train_step(settings: TrainSettings, group: ProcessGroup | None = None) -> TrainStep:
    """A train step in training, with the weights of the settings' seed."""
    torch.manual_seed(settings.seed)
    encoder = Encoder.of(settings)
    encoder.train()
    train_step = TrainStep(encoder, settings, group or ProcessGroup())
    train_step.places = places_on_a_grid() if settings.loss.by_distance else None
    return train_step


def do_steps(train_step: TrainStep, steps: range, rate: float = 1e-3) -> list[float]:
    """The losses of these steps, each on this rank's share of the same batches whatever the ranks."""
    ranks = train_step.group.ranks
    return [
        float(
            train_step.step(
                [noise_batch(step, i) for i in range(train_step.group.rank, train_step.step_batches, ranks)], rate
            )
        )
        for step in steps
    ]
