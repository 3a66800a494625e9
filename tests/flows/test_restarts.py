"""What happens to a training when its worker is stopped, or its machine is gone: with real processes, killed for real.

The worker's SIGTERM is what a rollout sends. A lost machine is a ``kill -9`` of the worker, the flow run and the
trainers at once, so that nobody is left to report anything.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import httpx
import psutil
import pytest

from geostream.runs.run import run_folder
from geostream.store import Store
from geostream.training.checkpoint_files import list_checkpoints, read_position
from infra.stack import FOLDER, Stack
from tests.conftest import Checkout
from tests.flows.test_retrain_flow import ask, end_of, logged, main_rank, start, wait_until
from tests.flows.test_retrain_flow import store as store  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def state(stack: Checkout) -> Stack:
    """The stack, with a worker: the tests stop it."""
    up = stack.stack("up")
    assert up.returncode == 0, up.stderr
    return Stack.load(stack.folder / FOLDER)


def run_state(state: Stack, flow_run: str) -> Any:
    return ask(state, f"flow_runs/{flow_run}")["state"]


def kill_machine(state: Stack, store: Store) -> None:
    """Kill the worker and all that runs on it, at once and in this order: nobody sees another one end."""
    assert state.worker
    main_rank(store)
    family = state.worker.family()
    for process in family:
        process.suspend()
    for process in family:
        process.kill()
    _, left = psutil.wait_procs(family, timeout=30)
    assert len(family) >= 4 and not left


def up(stack: Checkout) -> Stack:
    done = stack.stack("up")
    assert done.returncode == 0, done.stderr
    return Stack.load(stack.folder / FOLDER)


def test_a_worker_that_is_stopped_leaves_a_checkpoint_and_the_training_goes_on(
    stack: Checkout, state: Stack, store: Store
) -> None:
    flow_run = start(state, store, epochs=40)
    main = main_rank(store)
    run = run_folder(store, "tiny", "one")
    before = list_checkpoints(run)[-1]
    assert state.worker
    os.kill(state.worker.pid, signal.SIGTERM)
    psutil.wait_procs([main], timeout=90)
    wait_until(lambda: not state.worker.running(), 120)  # type: ignore[union-attr]
    assert state.worker.family() == []
    after = list_checkpoints(run)[-1]
    assert after >= before and wait_until(lambda: "stopped by SIGTERM" in logged(state, flow_run), 30)
    position = read_position(run, after)
    waiting = wait_until(lambda: (now := run_state(state, flow_run))["type"] == "SCHEDULED" and now, 60)
    assert waiting["name"] == "AwaitingRetry"
    up(stack)
    assert end_of(state, flow_run)["type"] == "COMPLETED"
    where = f"goes on in epoch {position.epoch}, batch {position.cursor}"
    assert where in logged(state, flow_run) or f"goes on from epoch {position.epoch}" in logged(state, flow_run)
    assert ask(state, f"flow_runs/{flow_run}")["run_count"] == 2


def test_a_lost_machine_is_noticed_and_cancelling_ends(stack: Checkout, state: Stack, store: Store) -> None:
    """The first training is started again and goes on; the second one was cancelled, and stays so."""
    lost = start(state, store, epochs=40)
    kill_machine(state, store)
    assert run_state(state, lost)["type"] == "RUNNING"
    state, other = up(stack), store.child("other")
    [layout] = store.child("tiny", "layouts").folders()
    for info in store.list(f"tiny/layouts/{layout}"):
        other.write(info.path, store.read(info.path))
    cancelled = start(state, other, epochs=5000)
    kill_machine(state, other)
    ask(state, f"flow_runs/{cancelled}/set_state", {"state": {"type": "CANCELLING"}})
    state = up(stack)
    assert end_of(state, cancelled, timeout=300)["type"] == "CANCELLED"
    assert end_of(state, lost, timeout=400)["type"] == "COMPLETED"
    states = ask(state, f"flow_run_states/?flow_run_id={lost}")
    assert [one["name"] for one in states].count("Crashed") == 1
    run = run_folder(store, "tiny", "one")
    assert "goes on" in logged(state, lost) and read_position(run, list_checkpoints(run)[-1]).epoch == 40
    assert run_state(state, cancelled)["type"] == "CANCELLED"


def test_a_run_whose_worker_dies_while_it_starts_it_is_started_again(
    stack: Checkout, state: Stack, store: Store
) -> None:
    """It is "Pending", and nobody's; the automation that notices it is given less than its ten minutes here."""
    name = "geostream: a run that never starts has crashed"
    [automation] = [one for one in ask(state, "automations/filter", {}) if one["name"] == name]
    fields = ("name", "description", "enabled", "trigger", "actions")
    quick = {field: automation[field] for field in fields}
    quick["trigger"] = {**automation["trigger"], "within": 30.0}
    put(state, f"automations/{automation['id']}", quick)
    try:
        flow_run = start(state, store, epochs=4)
        wait_until(lambda: run_state(state, flow_run)["name"] == "Pending")
        assert state.worker
        family = state.worker.family()
        for process in family:
            process.suspend()
        assert run_state(state, flow_run)["name"] == "Pending"
        for process in family:
            process.kill()
        crashed = wait_until(lambda: (now := run_state(state, flow_run))["name"] == "AwaitingRetry" and now)
        assert crashed["type"] == "SCHEDULED"
        state = up(stack)
        assert end_of(state, flow_run)["type"] == "COMPLETED"
        names = [one["name"] for one in ask(state, f"flow_run_states/?flow_run_id={flow_run}")]
        assert names.count("Crashed") == 1 and names.count("Pending") == 2
    finally:
        put(state, f"automations/{automation['id']}", {field: automation[field] for field in fields})


def put(state: Stack, path: str, body: Any) -> None:
    assert state.prefect
    url = f"{state.prefect.api_url}/{path}"
    httpx.put(url, json=body, trust_env=False, timeout=30).raise_for_status()
