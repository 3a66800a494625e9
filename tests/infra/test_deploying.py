"""Deploying again changes nothing that people have set on a server: on the real one, by the commands that deploy."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import pytest

from infra.stack import FOLDER, Stack, _run
from tests.conftest import Checkout
from tests.flows.test_retrain_flow import ask, end_of, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KEPT = (
    *("schedules", "paused", "tags", "concurrency_options", "work_queue_name", "enforce_parameter_schema"),
    "job_variables",
)


def operation(state: Stack) -> dict[str, Any]:
    """What people may have set on the deployment ``retrain``."""
    [found] = ask(state, "deployments/filter", {"deployments": {"name": {"any_": ["retrain"]}}})
    limit = found["global_concurrency_limit"]
    return {name: found[name] for name in KEPT} | {"limit": limit and limit["limit"]}


def change(state: Stack, path: str, body: Any, method: str = "PATCH") -> None:
    assert state.prefect
    for left in reversed(range(10)):
        answer = httpx.request(method, f"{state.prefect.api_url}/{path}", json=body, trust_env=False, timeout=30)
        if answer.status_code != 503 or not left:  # its database is busy: ask again, as Prefect's own client does
            break
        time.sleep(1)
    answer.raise_for_status()


def test_deploying_again_leaves_alone_what_people_have_set(stack: Checkout) -> None:
    state = Stack.load(stack.folder / FOLDER)
    [found] = ask(state, "deployments/filter", {"deployments": {"name": {"any_": ["retrain"]}}})
    [weekly] = found["schedules"]
    assert not weekly["active"] and not found["paused"]
    here = f"deployments/{found['id']}"
    change(state, f"{here}/schedules/{weekly['id']}", {"active": True})
    own = {"schedule": {"interval": 86400}, "active": True}
    change(state, f"{here}/schedules", [own], "POST")
    change(state, "work_pools/geostream/queues", {"name": "urgent"}, "POST")
    mine = {"paused": True, "tags": ["mine"], "concurrency_limit": 2, "work_queue_name": "urgent"}
    mine["job_variables"] = {"env": {"OF_A_PERSON": "1"}}
    change(
        state, here, mine | {"work_pool_name": "geostream", "concurrency_options": {"collision_strategy": "ENQUEUE"}}
    )
    before = operation(state)
    assert len(before["schedules"]) == 2 and before["limit"] == 2 and before["work_queue_name"] == "urgent"
    assert before["job_variables"] == mine["job_variables"]

    command = ("prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "prefect.yaml")
    deployed = stack.run(*command, PREFECT_API_URL=state.prefect.api_url)  # type: ignore[union-attr]
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    assert operation(state) == before
    # As make up does where a flow has changed.
    state.deployed = ""
    state.save()
    assert stack.stack("up").returncode == 0
    assert operation(state) == before

    change(state, f"{here}/schedules/{weekly['id']}", None, "DELETE")  # one that is gone does not come back
    _run(state, stack.folder, *command[:3], "--name", "retrain", *command[4:])
    assert len(operation(state)["schedules"]) == 1


def test_automations_are_made_once_and_left_as_they_are_set(stack: Checkout) -> None:
    state = Stack.load(stack.folder / FOLDER)

    def automations() -> dict[str, Any]:
        return {one["name"]: one for one in ask(state, "automations/filter", {})}

    before = automations()
    ours = [name for name in before if name.startswith("geostream: ")]
    assert len(ours) == 5 and [one["enabled"] for one in before.values()].count(False) == 1
    again = before["geostream: start crashed trainings again"]
    change(state, f"automations/{again['id']}", {"enabled": False})
    own = {name: again[name] for name in ("trigger", "actions")} | {"name": "somebody's own", "enabled": True}
    change(state, "automations/", own, "POST")
    _run(state, stack.folder, "infra.automations")
    after = automations()
    assert set(after) == set(before) | {"somebody's own"}
    assert not after["geostream: start crashed trainings again"]["enabled"] and after["somebody's own"]["enabled"]
    change(state, f"automations/{again['id']}", {"enabled": True})
    change(state, f"automations/{after[own['name']]['id']}", None, "DELETE")
    done = stack.run(
        sys.executable, "-m", "infra.automations", "--alert-block", "slack-webhook/nobody",
        PREFECT_API_URL=state.prefect.api_url,  # type: ignore[union-attr]
    )  # fmt: skip
    assert done.returncode == 1 and "slack-webhook/nobody" in done.stderr


@contextmanager
def web_server(received: list[dict[str, Any]]) -> Iterator[str]:
    """A real HTTP server that keeps what is posted to it as JSON; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_an_alert_is_sent_where_a_flow_fails(stack: Checkout) -> None:
    state, received = Stack.load(stack.folder / FOLDER), list[dict[str, Any]]()
    kind = ask(state, "block_types/slug/custom-webhook")
    [schema] = ask(state, "block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}})
    with web_server(received) as url:
        message = {"subject": "{{subject}}", "body": "{{body}}"}
        data = {"name": "on call", "url": url, "method": "POST", "json_data": message}
        ids = {"block_type_id": kind["id"], "block_schema_id": schema["id"]}
        ask(state, "block_documents/", {"name": "on-call", "data": data, **ids})
        _run(state, stack.folder, "infra.automations", "--alert-block", "custom-webhook/on-call")
        [shard] = ask(state, "deployments/filter", {"deployments": {"name": {"any_": ["shard-vigor"]}}})
        parameters = {"parameters": {"raw": "/nowhere/VIGOR"}}
        flow_run = ask(state, f"deployments/{shard['id']}/create_flow_run", parameters)
        assert end_of(state, flow_run["id"])["type"] == "FAILED"
        wait_until(lambda: received, 60)
    [alert] = received
    assert alert["subject"] == "geostream: shard Failed" and "/nowhere/VIGOR" in alert["body"]
    assert f"/runs/flow-run/{flow_run['id']}" in alert["body"]
