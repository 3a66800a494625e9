"""The flow ``retrain`` with two ranks on a worker, against a real S3: it fails, a rank is killed, it is cancelled."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
import pytest

from flows.common import open_store
from geostream.errors import NotFound
from geostream.runs.log import RunLog
from geostream.runs.run import LOG, run_folder
from geostream.store import Store
from geostream.training.checkpoint_files import list_checkpoints, read_position
from infra.stack import FOLDER, Stack
from tests.conftest import Checkout
from tests.helpers import tiny_layout
from tests.training.settings import TINY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = TINY.changed(batch_size=2, step_batches=2, checkpoint_every=2, mine_every=1000, evaluate_every=1000)


@pytest.fixture(scope="module")
def state(stack: Checkout) -> Stack:
    return Stack.load(stack.folder / FOLDER)


@pytest.fixture
def store(state: Stack, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A folder of the test's own in the stack's store, with a small layout."""
    for name, value in state.environment().items():
        monkeypatch.setenv(name, value)
    store = open_store(None).child(request.node.name.replace("_", "-"))
    tiny_layout(store)
    return store


def ask(state: Stack, path: str, body: dict[str, Any] | None = None) -> Any:
    """What the server answers; without a body, to a GET."""
    assert state.prefect is not None
    url = f"{state.prefect.api_url}/{path}"
    for _ in range(20):
        with httpx.Client(trust_env=False, timeout=30) as client:
            answer = client.get(url) if body is None else client.post(url, json=body)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:  # its database is busy
            break
        time.sleep(0.5)
    answer.raise_for_status()
    return answer.json()


def start(state: Stack, store: Store, **settings: Any) -> str:
    """Begin to train the run "one" with two ranks; the id of the flow run."""
    [retrain] = ask(state, "deployments/filter", {"deployments": {"name": {"any_": ["retrain"]}}})
    parameters = {"store": store.url, "run": "one", "processes": 2, "settings": SETTINGS.changed(**settings).flat()}
    made = ask(state, f"deployments/{retrain['id']}/create_flow_run", {"parameters": parameters})
    return str(made["id"])


def wait_until(ready: Callable[[], Any], timeout: float = 400) -> Any:
    until = time.monotonic() + timeout
    while not (found := ready()):
        assert time.monotonic() < until
        time.sleep(0.1)
    return found


def end_of(state: Stack, flow_run: str, timeout: float = 400) -> dict[str, Any]:
    """The state that the flow run ends in."""

    def ended() -> Any:
        now = ask(state, f"flow_runs/{flow_run}")["state"]
        # A crashed training is started again.
        return now if now["type"] in ("COMPLETED", "FAILED", "CANCELLED") else None

    found: dict[str, Any] = wait_until(ended, timeout)
    return found


def logged(state: Stack, flow_run: str) -> str:
    found = ask(state, "logs/filter", {"logs": {"flow_run_id": {"any_": [flow_run]}}, "limit": 200})
    return "\n".join(one["message"] for one in found)


def main_rank(store: Store) -> psutil.Process:
    """The process that trains the run, when its first checkpoint lies on the store."""
    run = run_folder(store, "tiny", "one")

    def found() -> Any:
        try:
            return list_checkpoints(run) and run.read_json("lease/00000001.json")["pid"]
        except NotFound:
            return None

    return psutil.Process(wait_until(found))


def stage_runs(state: Stack, flow_run: str) -> list[dict[str, Any]]:
    """The task runs of a flow run's stages."""
    found = ask(state, "task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}, "limit": 200})
    return [one for one in found if one["name"].startswith("epoch ")]


def test_what_ranks_refuse_is_the_flows_own_error(state: Stack, store: Store) -> None:
    ended = end_of(state, flow_run := start(state, store, step_batches=3))
    assert ended["type"] == "FAILED" and "2 ranks cannot share the 3 batches" in ended["message"]
    assert "torch/distributed/elastic" not in logged(state, flow_run)
    assert stage_runs(state, flow_run) == []  # it had not come to one


def test_a_training_fails_in_its_stage(state: Stack, store: Store) -> None:
    """All images of the training set are damaged: what was planned cannot be trained."""
    [layout] = store.child("tiny", "layouts").folders()
    for info in store.list(f"tiny/layouts/{layout}"):
        if info.path.endswith(".tar"):
            store.write(info.path, bytes(info.size))
    flow_run = start(state, store)
    wait_until(lambda: any(one["state_type"] == "CRASHED" for one in stage_runs(state, flow_run)))
    stages = {one["name"]: one for one in stage_runs(state, flow_run)}
    assert (stages["epoch 1: plan"]["state_type"], stages["epoch 1: train"]["state_type"]) == ("COMPLETED", "CRASHED")
    assert "shard-0000" in stages["epoch 1: train"]["state"]["message"]
    ask(state, f"flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING"}})  # else it is tried again
    assert end_of(state, flow_run)["type"] == "CANCELLED"


def test_a_killed_rank_is_another_try_from_the_last_checkpoint(state: Stack, store: Store) -> None:
    flow_run = start(state, store, epochs=20)
    main_rank(store).kill()
    assert end_of(state, flow_run)["type"] == "COMPLETED"
    log = logged(state, flow_run)
    assert "rank 0 was ended by SIGKILL" in log and ("goes on in epoch" in log or "goes on from epoch" in log)
    run = run_folder(store, "tiny", "one")
    position = read_position(run, list_checkpoints(run)[-1])
    assert (position.epoch, position.finished) == (20, True) and run.exists("report.html")
    trained = [(f"epoch {epoch}: train", "COMPLETED") for epoch in range(1, 21)]

    def shown() -> list[tuple[str, str]]:
        return [(one["name"], one["state_type"]) for one in stage_runs(state, flow_run)]

    wait_until(lambda: trained[-1] in shown())
    assert sorted(one for one in shown() if one[0].endswith("train")) == sorted(trained)
    assert len(shown()) == len({name for name, _ in shown()})


def test_a_training_goes_on_while_prefects_server_is_away(state: Stack, store: Store) -> None:
    """Its stages and its progress are told of when the server answers again, or never; the trainer notices nothing."""
    flow_run = start(state, store, epochs=60)
    main_rank(store)
    run = run_folder(store, "tiny", "one")

    def trained() -> int:
        return len(RunLog(run, LOG).of("train"))

    assert state.prefect
    server = state.prefect.child.family()
    for process in server:
        process.suspend()
    try:
        before = trained()
        wait_until(lambda: trained() >= before + 10)
    finally:
        for process in server:
            process.resume()
    assert end_of(state, flow_run)["type"] == "COMPLETED" and trained() == 60


def test_cancelling_leaves_a_checkpoint_and_no_rank(state: Stack, store: Store) -> None:
    flow_run = start(state, store, epochs=5000)
    main = main_rank(store)
    family = [main, *main.parent().children(), main.parent()]
    ask(state, f"flow_runs/{flow_run}/set_state", {"state": {"type": "CANCELLING"}})
    assert end_of(state, flow_run)["type"] == "CANCELLED"
    _, left = psutil.wait_procs(family, timeout=60)
    assert len(family) >= 3 and not left
    run = run_folder(store, "tiny", "one")
    assert wait_until(lambda: "stopped by SIGTERM" in (log := logged(state, flow_run)) and "(saved: epoch" in log)
    assert list_checkpoints(run) and run.child("lease").list() == []
