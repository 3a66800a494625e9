"""Deploying again changes nothing that people have set on a server: on the real one, by the commands that deploy."""

from __future__ import annotations

import sys
from typing import Any

import httpx
import pytest

from infra.stack import FOLDER, Stack, _run
from tests.conftest import Checkout
from tests.flows.test_retrain_flow import ask

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KEPT = ("schedules", "paused", "tags", "concurrency_options", "work_queue_name", "enforce_parameter_schema")


def operation(state: Stack) -> dict[str, Any]:
    """What people may have set on the deployment ``retrain``."""
    [found] = ask(state, "deployments/filter", {"deployments": {"name": {"any_": ["retrain"]}}})
    limit = found["global_concurrency_limit"]
    return {name: found[name] for name in KEPT} | {"limit": limit and limit["limit"]}


def change(state: Stack, path: str, body: Any, method: str = "PATCH") -> None:
    assert state.prefect
    httpx.request(method, f"{state.prefect.api_url}/{path}", json=body, trust_env=False, timeout=30).raise_for_status()


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
    change(
        state, here, mine | {"work_pool_name": "geostream", "concurrency_options": {"collision_strategy": "ENQUEUE"}}
    )
    before = operation(state)
    assert len(before["schedules"]) == 2 and before["limit"] == 2 and before["work_queue_name"] == "urgent"

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
