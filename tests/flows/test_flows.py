"""The flows as users run them: by their deployments' bare names, on a server and a worker, against a real S3."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows.common import open_store
from flows.shard import shard_options
from geostream.errors import BadInput
from geostream.layout import open_layout
from geostream.store import Store
from infra.stack import FOLDER, Stack
from sharding import ADAPTERS, ShardOptions
from tests.conftest import Checkout

TINY = {
    "tile_size": 32,
    "view_height": 32,
    "view_width": 64,
    "epochs": 1,
    "batch_size": 8,
    "neighbours": 16,
    "resident_shards": 2,
}


@pytest.fixture(scope="module")
def state(stack: Checkout) -> Stack:
    return Stack.load(stack.folder / FOLDER)


@pytest.fixture
def store(state: Stack, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The stack's store, as the file to source lets one reach it."""
    for name, value in state.environment().items():
        monkeypatch.setenv(name, value)
    return open_store(None)


def _ask(state: Stack, path: str, body: dict[str, Any] | None = None) -> Any:
    assert state.prefect is not None
    for _ in range(20):
        answer = httpx.post(f"{state.prefect.api_url}/{path}", json=body or {}, trust_env=False, timeout=30)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:  # its database is busy
            break
        time.sleep(0.5)
    answer.raise_for_status()
    return answer.json()


def task_runs(state: Stack, flow_run: str, last: str) -> dict[str, dict[str, Any]]:
    """The task runs of a flow run by name, once the server has recorded the last one; it does so seconds later."""
    until = time.monotonic() + 60
    while True:
        found = _ask(state, "task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}, "limit": 200})
        names = [one["name"] for one in found]
        assert len(names) == len(set(names))
        if last in names and not any(one["state_type"] == "RUNNING" for one in found):
            return dict(zip(names, found, strict=True))
        assert time.monotonic() < until
        time.sleep(0.5)


def _asset(state: Stack, url: str) -> tuple[dict[str, Any], list[str]]:
    """The event by which an asset was noted, and the keys of the assets that it was made of."""
    name = "prefect.asset.materialization.succeeded"
    body = {"filter": {"event": {"name": [name]}, "resource": {"id": [url]}}}
    until = time.monotonic() + 30
    while not (found := _ask(state, "events/filter", body)["events"]):
        assert time.monotonic() < until
        time.sleep(0.5)
    [event] = found
    return event, [one["prefect.resource.id"] for one in event["related"] if one["prefect.resource.role"] == "asset"]


@pytest.fixture(scope="module")
def sharded(stack: Checkout) -> str:
    """What the command says that shards a small rendered city; before it, a flow run that must fail."""
    assert stack.run("prefect", "deployment", "run", "shard-vigor", "-p", "raw=/nowhere/VIGOR").returncode == 0
    done = stack.run("prefect", "deployment", "run", "shard-vigor", "-p", "city=small", "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_shard_vigor_commits_a_layout(sharded: str, stack: Checkout, state: Stack, store: Store) -> None:
    assert "Completed" in sharded
    layout = open_layout(store, "simcity", None)
    assert layout.name == "base" and layout.info["pairs"]["train"] > 50
    assert layout.info["images"]["enlarged"] == 0
    assert (stack.folder / "runs" / "raw" / "simcity-small-0" / "simcity.json").exists()
    [artifact] = _ask(state, "artifacts/filter", {"artifacts": {"key": {"any_": ["layout"]}}})
    assert json.loads(artifact["data"])[0]["places"] == layout.n_places
    [progress] = _ask(state, "artifacts/filter", {"artifacts": {"key": {"any_": ["sharding"]}}})
    assert float(progress["data"]) == 100.0
    made, [raw] = _asset(state, layout.store.url)
    assert made["payload"]["places"] == layout.n_places and raw == (stack.folder / "runs/raw/simcity-small-0").as_uri()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "options", "protocols"),
    [
        ("cvusa", {}, ("paired",)),
        ("cvact", {"protocol": "test"}, ("paired", "within-5m")),
        ("university1652", {"views": "drone"}, ("both-ways",)),
    ],
)
def test_the_other_datasets_have_deployments_of_their_own(
    stack: Checkout, state: Stack, store: Store, adapter: str, options: dict[str, str], protocols: tuple[str, ...]
) -> None:
    """First a dry run, which writes nothing; then the layout, of cities rendered as that dataset's raw folder."""
    target = store.child(f"deployments-{adapter}")
    command = ["prefect", "deployment", "run", f"shard-{adapter}", "--watch", "-p", "city=small"]
    command += ["-p", f"store={target.url}", "-p", f"adapter_options={json.dumps(options)}"]
    done = stack.run(*command, "-p", "dry_run=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert target.list() == []
    artifacts = _ask(state, "artifacts/filter", {"artifacts": {"key": {"any_": ["dry-run"]}}, "sort": "CREATED_DESC"})
    foretold = {row["what"]: row["value"] for row in json.loads(artifacts[0]["data"])}
    assert foretold["layout"] == f"{target.url}/simcity-{adapter}/layouts/base"
    done = stack.run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    layout = open_layout(target, f"simcity-{adapter}", "base")
    assert layout.protocols == protocols and len(layout.pairs("train")) and len(layout.pairs("test"))
    assert int(foretold["shards"]) == len(layout.shard_names)
    assert (stack.folder / "runs" / "raw" / f"simcity-{adapter}-small-0" / "simcity.json").exists()


def test_every_dataset_has_a_deployment_with_its_parameters(stack: Checkout, state: Stack) -> None:
    deployments = {one["name"]: one["parameters"] for one in _ask(state, "deployments/filter")}
    for adapter in ADAPTERS:
        parameters = deployments[f"shard-{adapter}"]
        assert parameters["adapter"] == adapter and parameters["adapter_options"] == {}
        assert parameters["raw"] is None and parameters["dry_run"] is False and parameters["layout"] == "base"


def test_retrain_trains_evaluates_and_reports_on_the_newest_layout(
    sharded: str, stack: Checkout, state: Stack, store: Store
) -> None:
    done = stack.run("prefect", "deployment", "run", "retrain", "--watch", "-p", f"settings={json.dumps(TINY)}")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = store.child("simcity", "runs")
    [name] = runs.folders()
    assert name.startswith("retrain-20")
    run = runs.child(name)
    assert [json.loads(line)["stage"] for line in run.read("metrics.jsonl").splitlines()] == [
        "plan",
        "train",
        "evaluate",
        "compare",
    ]
    settings = run.read_json("settings.json")
    assert (settings["model"]["name"], settings["optim"]["epochs"]) == (
        "test_convnext",
        1,
    )
    assert b"</html>" in run.read("report.html")
    [artifact] = _ask(state, "artifacts/filter", {"artifacts": {"key": {"any_": ["evaluation"]}}})
    layout = open_layout(store, None, None)
    assert json.loads(artifact["data"])[-1]["gallery"] == str(len(layout.references("test")))
    assert _asset(state, run.url)[1] == [layout.store.url]
    model, [of] = _asset(state, store.child("simcity", "models", "0001").url)
    assert of == run.url and 0 <= model["payload"]["R@1"] <= 1


def test_the_stages_of_a_training_are_task_runs_with_its_own_times(
    sharded: str, stack: Checkout, state: Stack, store: Store
) -> None:
    [name] = store.child("simcity", "runs").folders()
    [flow_run] = _ask(state, "flow_runs/filter", {"flow_runs": {"name": {"like_": name}}})
    runs = task_runs(state, flow_run["id"], "asset simcity model 1")
    records = [json.loads(line) for line in store.child("simcity", "runs", name).read("metrics.jsonl").splitlines()]
    staged = [record for record in records if record["stage"] != "compare"]
    assert {found for found in runs if found.startswith("epoch ")} == {f"epoch 1: {r['stage']}" for r in staged}
    for record in staged:
        one = runs[f"epoch 1: {record['stage']}"]
        assert one["state_type"] == "COMPLETED"
        started, ended = (datetime.fromisoformat(one[which]).timestamp() for which in ("start_time", "end_time"))
        assert abs(started - record["started"]) < 0.01 and abs(ended - started - record["seconds"]) < 0.01


def test_bad_input_fails_the_run_with_the_reason(sharded: str, state: Stack) -> None:
    [failed] = _ask(state, "flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["FAILED"]}}}})
    assert "/nowhere/VIGOR: no such folder" in failed["state"]["message"]


def test_wrong_parameters_make_no_flow_run(stack: Checkout, state: Stack) -> None:
    before = _ask(state, "flow_runs/count")
    assert state.prefect is not None
    [retrain] = _ask(state, "deployments/filter", {"deployments": {"name": {"any_": ["retrain"]}}})
    url = f"{state.prefect.api_url}/deployments/{retrain['id']}/create_flow_run"
    for wrong, named in (({"settings": {"batch_sze": 8}}, "batch_sze"), ({"datset": "simcity"}, "datset")):
        refused = httpx.post(url, json={"parameters": wrong}, trust_env=False, timeout=30)
        assert refused.status_code == httpx.codes.CONFLICT and named in refused.text
    [vigor] = _ask(state, "deployments/filter", {"deployments": {"name": {"any_": ["shard-vigor"]}}})
    url = f"{state.prefect.api_url}/deployments/{vigor['id']}/create_flow_run"
    foreign = {"adapter_options": {"views": "drone"}}
    refused = httpx.post(url, json={"parameters": foreign}, trust_env=False, timeout=30)
    assert refused.status_code == httpx.codes.CONFLICT and "views" in refused.text
    done = stack.run("prefect", "deployment", "run", "retrain", "-p", 'settings={"batch_size": 1}')
    assert done.returncode != 0 and "batch_size" in done.stdout + done.stderr
    assert _ask(state, "flow_runs/count") == before


def test_pages_ask_the_servers_own_address(state: Stack) -> None:
    assert state.prefect is not None
    settings = httpx.get(f"{state.prefect.url}/ui-settings", trust_env=False, timeout=30).raise_for_status().json()
    assert settings["api_url"] == state.prefect.api_url


def test_full_form_is_left_alone(stack: Checkout) -> None:
    """Scheduled for tomorrow, so that it does not run."""
    done = stack.run("prefect", "deployment", "run", "shard/shard-vigor", "--start-in", "1 day")
    assert done.returncode == 0 and "shard/shard-vigor" in done.stdout


def test_unknown_name_is_one_line_and_exit_code_1(stack: Checkout) -> None:
    done = stack.run("prefect", "deployment", "run", "shard-vigour", "--watch")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "'shard-vigour'" in done.stderr
    sharding = ("cv-cities", "cvact", "cvusa", "gta-uav", "photos", "table", "university1652", "vigor")
    known = ", ".join(["recluster/recluster", "retrain/retrain", *(f"shard/shard-{name}" for name in sharding)])
    assert known in done.stderr


def test_ambiguous_name_is_one_line_and_exit_code_1(stack: Checkout, state: Stack) -> None:
    flow = _ask(state, "flows/", {"name": "another"})
    _ask(state, "deployments/", {"name": "twice", "flow_id": flow["id"]})
    other = _ask(state, "flows/", {"name": "other"})
    _ask(state, "deployments/", {"name": "twice", "flow_id": other["id"]})
    done = stack.run("prefect", "deployment", "run", "twice")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "'twice'" in done.stderr and "another/twice, other/twice" in done.stderr


def test_retrain_is_scheduled_weekly_and_paused(stack: Checkout, state: Stack) -> None:
    [retrain] = _ask(state, "deployments/filter", {"deployments": {"name": {"any_": ["retrain"]}}})
    [schedule] = retrain["schedules"]
    assert schedule["schedule"]["cron"] == "0 3 * * 1" and not schedule["active"]


def test_options_become_shard_options_or_are_named() -> None:
    assert shard_options({"tile_size": [64, 64], "quality": 80}) == ShardOptions(tile_size=(64, 64), quality=80)
    with pytest.raises(BadInput, match="qualty: .*tile_size"):
        shard_options({"qualty": 80})
    with pytest.raises(BadInput, match="tile_size"):
        shard_options({"tile_size": "large"})


def test_no_store_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GEOSTREAM_STORE", raising=False)
    with pytest.raises(BadInput, match="GEOSTREAM_STORE"):
        open_store(None)
    monkeypatch.setenv("GEOSTREAM_STORE", str(tmp_path))
    assert open_store(None).url == str(tmp_path)
