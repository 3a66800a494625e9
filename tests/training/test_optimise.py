"""The learning rate as a function, and that steps lower the loss."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from geostream.errors import GeostreamError
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.streaming.dataset import plan_dataset
from geostream.streaming.loader import Loader
from geostream.training.augment import Augmentation
from geostream.training.embed import image_sizes
from geostream.training.optimise import EpochOutcome, learning_rate, make_optimizer, train_epoch
from geostream.training.stages import new_encoder, plan_epoch
from tests.helpers import tiny_layout
from tests.training.settings import TINY


def test_one_cycle_is_torchs() -> None:
    settings = TrainSettings(learning_rate=2e-3, schedule="one-cycle")
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    schedule = OneCycleLR(optimizer, 2e-3, total_steps=1001)
    for step in range(1001):
        assert learning_rate(min(step / 1000, 1), settings) == pytest.approx(
            schedule.get_last_lr()[0], rel=0.02, abs=1e-5
        )
        optimizer.step()
        if step < 1000:
            schedule.step()


def test_cosine_warms_up_and_ends_at_nothing() -> None:
    settings = TrainSettings(learning_rate=1e-3, epochs=40, warmup_epochs=1)
    rates = [learning_rate(done, settings) for done in np.linspace(0, 1, 401)]
    assert rates[0] == 0 and rates[5] == pytest.approx(5e-4) and rates[10] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-3) and rates[-1] == pytest.approx(0)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert learning_rate(10 / 400 + 195 / 400, settings) == pytest.approx(5e-4)


def test_constant_and_a_warm_up_as_long_as_the_run() -> None:
    assert learning_rate(0.7, TrainSettings(schedule="constant", learning_rate=0.5)) == 0.5
    assert learning_rate(0.5, TrainSettings(epochs=1, warmup_epochs=3, learning_rate=0.5)) == 0.25
    assert learning_rate(1.0, TrainSettings(epochs=1, warmup_epochs=3, learning_rate=0.5)) == 0.5


def test_a_few_epochs_lower_the_loss(tmp_path: Path) -> None:
    layout = tiny_layout(Store.open(tmp_path), places=32, view_size=(32, 64))
    settings = TINY.model_copy(update={"epochs": 8, "batch_size": 8, "checkpoint_every": 2})
    run = Store.open(tmp_path / "run")
    encoder = new_encoder(settings)
    optimizer = make_optimizer(encoder, settings)
    plan = plan_epoch(run, layout, settings, 1)
    losses = []
    for epoch in range(1, 9):
        change = Augmentation.of(settings, epoch, 32)
        dataset = plan_dataset(layout, plan, image_sizes(settings), change=change)
        saved: list[EpochOutcome] = []
        outcome = train_epoch(encoder, optimizer, Loader(dataset), settings, epoch, EpochOutcome(), saved.append)
        losses.append(outcome.loss)
        assert outcome.pairs == plan.place.size and 0 <= outcome.stream.stall_seconds <= outcome.seconds
        assert [one.batches for one in saved] == [2] and saved[0].pairs == 16  # every second of four
        assert EpochOutcome.from_dict(json.loads(json.dumps(outcome.as_dict()))) == outcome
        assert outcome.stream.bytes_used <= outcome.stream.bytes_fetched
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    layout = tiny_layout(Store.open(tmp_path), view_size=(32, 64))
    encoder = new_encoder(TINY)
    with torch.no_grad():
        encoder.logit_scale.fill_(float("nan"))
    plan = plan_epoch(Store.open(tmp_path / "run"), layout, TINY, 1)
    dataset = plan_dataset(layout, plan, image_sizes(TINY), change=Augmentation.of(TINY, 1, 12))
    with pytest.raises(GeostreamError, match="the loss is nan; lower learning_rate"):
        train_epoch(encoder, make_optimizer(encoder, TINY), Loader(dataset), TINY, 1, EpochOutcome(), print)
