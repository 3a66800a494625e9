"""A training may be started again as often as it takes, but not for ever without a new checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import pytest
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError

import flows.retrain as module
from flows.tries import MOST, GivenUp, begin_try
from geostream.store import Store


def checkpoint(run: Store, step: int) -> None:
    run.write(f"checkpoints/step-{step:08d}/state.json", b"{}")


def test_only_tries_without_progress_are_counted(tmp_path: Path) -> None:
    run = Store.open(tmp_path)
    for number in range(1, MOST + 1):
        assert begin_try(run) == number
    checkpoint(run, 2)
    for step in range(4, 4 + 10 * MOST, 2):  # far more tries than MOST, each from a newer checkpoint
        assert begin_try(run) == 1
        checkpoint(run, step)
    for number in range(1, MOST + 1):
        assert begin_try(run) == number
    with pytest.raises(GivenUp, match=r"step-000000\d\d"):
        begin_try(run)
    assert begin_try(run) == 1  # somebody retries it, once the cause is gone


def test_a_busy_server_is_asked_again_for_a_place_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [ConcurrencySlotAcquisitionError("503 Service Unavailable")] * 2
    held = []

    @contextmanager
    def busy(name: str, **_: object) -> Iterator[None]:
        if answers:
            raise answers.pop()
        held.append(name)
        yield
        held.remove(name)

    monkeypatch.setattr(module, "concurrency", busy)
    monkeypatch.setattr(module, "RETRY_DELAY", 0.0)
    with pytest.raises(ConcurrencySlotAcquisitionError, match="the training's own"), module.hold_slot("train-tiny"):
        assert held == ["train-tiny"] and not answers
        raise ConcurrencySlotAcquisitionError("the training's own")  # is not taken for the server's


def test_run_names_differ_within_a_second_and_stay_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = datetime.now(UTC)
    ids = [UUID("01a22854-ebfe-7a97-94b3-48259cf0b9f7"), UUID("01a22854-ebfe-7a97-94b3-48259cf0b9f8")]
    names = []
    for flow_run_id in [*ids, ids[0]]:
        known = SimpleNamespace(scheduled_start_time=begun, id=str(flow_run_id))
        monkeypatch.setattr(module, "flow_run", known)
        names.append(module.run_name())
    assert names[0] != names[1] and names[0] == names[2] and names[0].startswith(f"retrain-{begun:%Y%m%d-%H%M%S}-")
