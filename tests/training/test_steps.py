"""The learning rate as a function, what decays, and the loop of an epoch: its points, its checkpoints and its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR

from geostream.errors import BadInput, GeostreamError, Interrupted
from geostream.layout import Layout
from geostream.planning.make_plan import make_plan
from geostream.planning.plan import EpochPlan
from geostream.runs.stages import new_encoder
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.streaming.dataset import plan_dataset
from geostream.streaming.loader import Loader
from geostream.streaming.pipeline import ImageSizes
from geostream.training.augment import Augmentation
from geostream.training.distributed import ProcessGroup
from geostream.training.model import Encoder
from geostream.training.optimizer import learning_rate, make_optimizer
from geostream.training.step import TrainStep
from geostream.training.steps import CURVE_POINTS, EpochOutcome, train_epoch
from tests.helpers import tiny_layout
from tests.training.settings import TINY

EIGHT = TINY.changed(epochs=8, batch_size=8, checkpoint_every=2)


def new_train_step(settings: TrainSettings) -> TrainStep:
    return TrainStep(new_encoder(settings), settings, ProcessGroup())


def loader_of(layout: Layout, plan: EpochPlan, settings: TrainSettings, epoch: int = 1) -> Loader:
    change = Augmentation.of(settings, epoch, len(layout.pairs("train")))
    return Loader(plan_dataset(layout, plan, ImageSizes.of(settings), change=change))


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return tiny_layout(Store.open(tmp_path_factory.mktemp("layout")), places=32, view_size=(32, 64))


def one_epoch(
    layout: Layout, settings: TrainSettings, run: Path, stopping: Callable[[], bool] = lambda: False, **arguments: Any
) -> tuple[EpochOutcome | Interrupted, list[EpochOutcome], TrainStep]:
    """What an epoch of four batches came to, what it saved, and the train_step behind it."""
    plan = make_plan(layout, None, settings.changed(strategy="random"), 1, settings.seed)
    train_step, saved = arguments.get("train_step") or new_train_step(settings), list[EpochOutcome]()
    loader = loader_of(layout, plan, settings)
    before = arguments.get("before", EpochOutcome())
    loader.load_state_dict({"plan": plan.hash, "cursor": before.batches})
    try:
        outcome: EpochOutcome | Interrupted
        outcome = train_epoch(train_step, loader, settings, 1, before, saved.append, stopping)
    except Interrupted as error:
        outcome = error
    assert loader.state_dict()["cursor"] == (saved[-1].batches if isinstance(outcome, Interrupted) else plan.n_batches)
    return outcome, saved, train_step


def test_one_cycle_is_torchs() -> None:
    settings = TrainSettings().changed(learning_rate=2e-3, schedule="one-cycle")
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], 1.0)
    schedule = OneCycleLR(optimizer, 2e-3, total_steps=1001)
    for step in range(1001):
        assert learning_rate(min(step / 1000, 1), settings) == pytest.approx(
            schedule.get_last_lr()[0], rel=0.02, abs=1e-5
        )
        optimizer.step()
        if step < 1000:
            schedule.step()


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 5e-4), ("linear", 5e-4)])
def test_rates_warm_up_and_end_at_nothing(schedule: str, middle: float) -> None:
    settings = TrainSettings().changed(learning_rate=1e-3, epochs=40, warmup_epochs=1, schedule=schedule)
    rates = [learning_rate(done, settings) for done in np.linspace(0, 1, 401)]
    assert rates[0] == 0 and rates[5] == pytest.approx(5e-4) and rates[10] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(1e-3) and rates[-1] == pytest.approx(0)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert learning_rate(10 / 400 + 195 / 400, settings) == pytest.approx(middle)
    quarter = learning_rate(10 / 400 + 390 / 1600, settings)
    assert quarter == pytest.approx(7.5e-4 if schedule == "linear" else 1e-3 * (1 + 0.5**0.5) / 2)


def test_constant_and_a_warm_up_as_long_as_the_run() -> None:
    assert learning_rate(0.7, TrainSettings().changed(schedule="constant", learning_rate=0.5)) == 0.5
    assert learning_rate(0.5, TrainSettings().changed(epochs=1, warmup_epochs=3, learning_rate=0.5)) == 0.25
    assert learning_rate(1.0, TrainSettings().changed(epochs=1, warmup_epochs=3, learning_rate=0.5)) == 0.5


def test_what_decays() -> None:
    encoder = Encoder("test_vit")
    everything = make_optimizer(encoder, TrainSettings().changed(weight_decay=0.1))
    assert {group["weight_decay"] for group in everything.param_groups} == {0.1}
    chosen = make_optimizer(encoder, TrainSettings().changed(weight_decay=0.1, decay_all=False))
    decay = {id(p): group["weight_decay"] for group in chosen.param_groups for p in group["params"]}
    decayed = {name for name, p in encoder.named_parameters() if decay[id(p)]}
    assert len(decay) == len(list(encoder.parameters()))
    assert decayed == {
        name for name, p in encoder.named_parameters() if name.endswith("weight") and "norm" not in name and p.ndim > 1
    }
    assert "network.pos_embed" not in decayed and "logit_scale" not in decayed and len(decayed) > 10


def test_a_few_epochs_lower_the_loss(layout: Layout, tmp_path: Path) -> None:
    settings = EIGHT.changed(blur_probability=0.0, dropout_probability=0.0)
    plan = make_plan(layout, None, settings.changed(strategy="random"), 1, settings.seed)
    train_step = new_train_step(settings)
    losses = []
    for epoch in range(1, 9):
        saved: list[EpochOutcome] = []
        loader = loader_of(layout, plan, settings, epoch)
        outcome = train_epoch(train_step, loader, settings, epoch, EpochOutcome(), saved.append)
        losses.append(outcome.loss)
        assert outcome.pairs == plan.place.size and 0 <= outcome.stream.stall_seconds <= outcome.seconds
        assert [(one.steps, one.batches, one.pairs) for one in saved] == [(2, 2, 16)]  # every second of four
        assert EpochOutcome.from_dict(json.loads(json.dumps(outcome.as_dict()))) == outcome
        assert outcome.stream.bytes_used <= outcome.stream.bytes_fetched
    assert losses[-1] < 0.8 * losses[0]


def test_the_curve(layout: Layout, tmp_path: Path) -> None:
    outcome, _, train_step = one_epoch(layout, EIGHT.changed(precision="fp16"), tmp_path)
    assert isinstance(outcome, EpochOutcome)
    assert [point[0] for point in outcome.curve] == [1, 2, 3, 4] and train_step.steps == 4
    assert np.mean([point[1] for point in outcome.curve]) == pytest.approx(outcome.loss, rel=1e-6)
    rates = [learning_rate((step + 0.5) / 4 / 8, EIGHT) for step in range(4)]
    assert [point[2] for point in outcome.curve] == pytest.approx(rates)
    assert [point[3] for point in outcome.curve] == [1024.0] * 4


def test_a_long_epochs_curve_has_few_points(layout: Layout, tmp_path: Path) -> None:
    before = EpochOutcome(steps=60, batches=0, loss_sum=60.0)  # as if it had 64 steps, four of them still to do
    outcome, _, _ = one_epoch(layout, EIGHT, tmp_path, before=before)
    assert isinstance(outcome, EpochOutcome) and outcome.steps == 64
    assert [point[0] for point in outcome.curve] == [2, 4] and len(outcome.curve) * 16 <= CURVE_POINTS
    before = EpochOutcome(steps=60, batches=0, loss_sum=60.0, curve=[[60, 1.0, 0.1]])
    outcome, _, _ = one_epoch(layout, EIGHT, tmp_path, before=before)
    assert isinstance(outcome, EpochOutcome) and [point[0] for point in outcome.curve] == [60, 2, 4]


def test_a_step_of_several_batches(layout: Layout, tmp_path: Path) -> None:
    settings = TINY.changed(step_batches=2, lanes=2, checkpoint_every=1)
    outcome, saved, train_step = one_epoch(layout, settings, tmp_path)
    assert isinstance(outcome, EpochOutcome) and outcome.steps > 2
    assert outcome.batches == 2 * outcome.steps and outcome.pairs == 4 * outcome.batches
    assert train_step.steps == outcome.steps
    assert [(one.steps, one.batches) for one in saved] == [(step, 2 * step) for step in range(1, outcome.steps)]
    with pytest.raises(BadInput, match="lanes"):
        one_epoch(layout, settings.changed(step_batches=outcome.batches + 1), tmp_path)


def test_a_request_to_stop_saves_and_what_is_left_ends_as_if_there_was_none(layout: Layout, tmp_path: Path) -> None:
    settings = EIGHT.changed(checkpoint_every=100)
    whole, _, wanted = one_epoch(layout, settings, tmp_path)
    answers = iter([False, True])
    stopped, saved, train_step = one_epoch(layout, settings, tmp_path, stopping=lambda: next(answers))
    assert isinstance(stopped, Interrupted) and "stopped after step 2 of 4" in str(stopped)
    assert isinstance(whole, EpochOutcome) and [one.steps for one in saved] == [2]
    rest, saved, _ = one_epoch(layout, settings, tmp_path, before=saved[0], train_step=train_step)
    assert isinstance(rest, EpochOutcome) and saved == []
    assert (rest.steps, rest.pairs, rest.loss_sum, rest.curve) == (4, 32, whole.loss_sum, whole.curve)
    for name, tensor in train_step.encoder.state_dict().items():
        assert torch.equal(tensor, wanted.encoder.state_dict()[name])


def test_a_request_to_stop_at_the_last_step_is_not_asked_for(layout: Layout, tmp_path: Path) -> None:
    asked: list[int] = []

    def stopping() -> bool:
        asked.append(1)
        return False

    outcome, saved, _ = one_epoch(layout, EIGHT, tmp_path, stopping=stopping)
    assert isinstance(outcome, EpochOutcome) and len(asked) == 3 and [one.steps for one in saved] == [2]


def test_a_loss_that_is_no_number_ends_the_run_unsaved(layout: Layout, tmp_path: Path) -> None:
    train_step = new_train_step(EIGHT)
    with torch.no_grad():
        train_step.encoder.logit_scale.fill_(float("nan"))
    with pytest.raises(GeostreamError, match="nan after 2 steps.*learning_rate"):
        one_epoch(layout, EIGHT, tmp_path, train_step=train_step)
