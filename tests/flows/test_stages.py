"""Which stage a training is in follows from those that are done: whole trainings are played, for both ways to mine."""

from __future__ import annotations

import pytest

from flows.stages import AT_WORK, Stage, last_trained, stages_of, under_way
from geostream.settings import TrainSettings

SETTINGS = TrainSettings().changed(epochs=6, first_mining=1, mine_every=2, evaluate_every=3)


def played(settings: TrainSettings, *, has_tests: bool, on_gpu: bool) -> list[Stage]:
    """All stages in the order in which a trainer does them, if each is done before the next one begins."""
    done: list[Stage] = []
    while stage := under_way(done, settings, has_tests=has_tests, on_gpu=on_gpu):
        done.append(stage)
    return done


def test_a_trainer_without_a_gpu_embeds_when_it_prepares_the_epoch_after_next() -> None:
    assert played(SETTINGS.changed(mining_lag=1), has_tests=True, on_gpu=False) == [
        ("plan", 1), ("train", 1),
        ("plan", 2), ("train", 2),
        ("embed", 1), ("mine", 1), ("plan", 3), ("train", 3), ("evaluate", 3),
        ("plan", 4), ("train", 4),
        ("embed", 3), ("mine", 3), ("plan", 5), ("train", 5),
        ("plan", 6), ("train", 6), ("evaluate", 6),
    ]  # fmt: skip


@pytest.mark.parametrize(("lag", "on_gpu"), [(0, False), (1, True)])
def test_a_trainer_that_embeds_itself_does_so_right_behind_the_epoch(lag: int, on_gpu: bool) -> None:
    stages = played(SETTINGS.changed(mining_lag=lag), has_tests=True, on_gpu=on_gpu)
    for epoch in (1, 3):
        at = stages.index(("embed", epoch))
        assert stages[at - 1] == (("evaluate", 3) if epoch == 3 else ("train", epoch))
        assert stages.index(("mine", epoch)) > at
    assert stages[-1] == ("evaluate", 6) and len(stages) == len(set(stages))


def test_random_batches_need_no_mining_and_a_layout_without_tests_no_evaluation() -> None:
    stages = played(SETTINGS.changed(strategy="random"), has_tests=False, on_gpu=True)
    assert stages == [(stage, epoch) for epoch in range(1, 7) for stage in ("plan", "train")]


def test_records_name_stages() -> None:
    records = [{"stage": "plan", "epoch": 1}, {"stage": "train", "epoch": 1}, {"stage": "progress", "epoch": 2}]
    assert stages_of(records) == {("plan", 1), ("train", 1), ("progress", 2)}
    assert last_trained(stages_of(records)) == 1 and last_trained(set()) == 0


@pytest.mark.parametrize(
    ("line", "at_work"),
    [
        ("plan: epoch 1  seconds 0.5", True),
        ("s3://geostream/tiny/runs/one: goes on in epoch 3, batch 4", True),
        ("s3://geostream/tiny/runs/one: held by process 3", False),
        ("compare: epoch 1", False),
    ],
)
def test_a_trainer_is_at_work_once_it_says_so(line: str, at_work: bool) -> None:
    assert (AT_WORK.match(line) is not None) == at_work
