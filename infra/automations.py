"""Create what looks after flow runs on a Prefect server: automations for lost runs, crashes, new layouts and alerts.

``make up``, compose and Kubernetes run ``python -m infra.automations`` after each deploying. It creates the automations
that are missing, and brings those that an older version made up to date. Whether one is switched on is left as people
have set it, and automations with other names are not touched. One that is not wanted is best switched off: one that is
deleted comes back.

Prefect's own words for what is used here: flow runs send a heartbeat event every PREFECT_FLOWS_HEARTBEAT_FREQUENCY
seconds, and a *proactive* trigger fires when an expected event stays away. Prefect's server does this by itself, so it
works where nothing of ours is running any more.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
from datetime import timedelta

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ChangeFlowRunState, RunDeployment, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.exceptions import ObjectNotFound

from infra.prefect_server import HEARTBEAT

FLOWS = ["retrain", "shard", "recluster"]
RETRAIN = "retrain/retrain"
ZOMBIE_AFTER = timedelta(seconds=5 * HEARTBEAT)
CANCEL_AFTER = timedelta(seconds=4 * HEARTBEAT)  # shorter than ZOMBIE_AFTER, so that what was cancelled stays so
# Starting takes seconds on a worker of processes, and minutes where a node is added and pulls the image first.
START_WITHIN = timedelta(minutes=10)
SETS = ("after", "expect", "for_each")  # fields of a trigger whose order means nothing
Related = dict[str, str | list[str]]  # labels of a resource
ALERT_BLOCK = "GEOSTREAM_ALERT_BLOCK"
# Without Crashed, which starts trainings again: on SQLite, what one automation does upon an event may lock the database
# for the next one that expects the same event, and that one would miss it. AwaitingRetry follows soon enough.
ENDED = {f"prefect.flow-run.{name}" for name in ("Completed", "Failed", "Cancelled", "AwaitingRetry")}
BEGUN = {"prefect.flow-run.Running"}
WAITING = {f"prefect.flow-run.{name}" for name in ("Scheduled", "Late", "AwaitingConcurrencySlot")}
RESTING = {f"prefect.flow-run.{name}" for name in ("Cancelling", "Paused", "Suspended")}


def lost() -> list[AutomationCore]:
    """Return what ends the flow runs that nobody is left to end: a sign that they go on stays away.

    - The heartbeat of a running one: its machine is gone, or was switched off.
    - The start of one that a worker has taken, because the worker died on the way. Such a run has no heartbeat yet, and
      no other worker takes it: it would stay "Pending" for ever.
    - The end of one that is being cancelled.
    """
    return [
        _unless(
            "geostream: a run without a heartbeat has crashed",
            "heartbeat",
            {"prefect.flow-run.heartbeat", *ENDED, *RESTING},
            ZOMBIE_AFTER,
            StateType.CRASHED,
            f"No heartbeat for {ZOMBIE_AFTER.seconds} s: its process or machine is gone.",
            [_of(FLOWS), {"prefect.resource.role": "deployment"}],
        ),
        _unless(
            "geostream: a run that never starts has crashed",
            "Pending",
            {*BEGUN, *WAITING, *ENDED, *RESTING},
            START_WITHIN,
            StateType.CRASHED,
            f"Not started {START_WITHIN.seconds // 60} min after a worker took it: the worker is gone.",
        ),
        _unless(
            "geostream: a run that nobody stops is cancelled",
            "Cancelling",
            ENDED,
            CANCEL_AFTER,
            StateType.CANCELLED,
            f"Cancelled; its process has not answered for {CANCEL_AFTER.seconds} s.",
        ),
    ]


def _unless(
    name: str,
    after: str,
    expect: set[str],
    within: timedelta,
    state: StateType,
    message: str,
    related: Related | list[Related] | None = None,
) -> AutomationCore:
    """Return what sets a flow run's state, unless one of the expected events comes in time after another one.

    Args:
        name: of the automation.
        after: what the flow run's event is called after which it waits.
        expect: the events that it waits for.
        within: how long.
        state: what the flow run becomes if none comes.
        message: of that state.
        related: what the flow run has to be related to; None: one of FLOWS.
    """
    return AutomationCore(
        name=name,
        trigger=EventTrigger(
            after={f"prefect.flow-run.{after}"},
            expect=expect,
            match_related=related or _of(FLOWS),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=within,
        ),
        actions=[ChangeFlowRunState(state=state, message=message)],
    )


def again() -> AutomationCore:
    """Return what schedules a crashed training anew: the same flow run, so it goes on under the same run name.

    How often is up to the flow, which gives up after some tries without progress (:mod:`flows.tries`).
    """
    return AutomationCore(
        name="geostream: start crashed trainings again",
        trigger=_each(
            "prefect.flow-run.Crashed",
            {"prefect.resource.role": "deployment", "prefect.resource.name": "retrain"},
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.SCHEDULED,
                name="AwaitingRetry",
                message="Crashed; started again, and goes on from its newest checkpoint.",
            )
        ],
    )


async def on_layout(client: PrefectClient) -> AutomationCore | None:
    """Return what trains on each layout that a flow commits, switched off; None where ``retrain`` is not deployed."""
    try:
        deployment = await client.read_deployment_by_name(RETRAIN)
    except ObjectNotFound:
        return None
    labels = {"store": "geostream.store", "dataset": "geostream.dataset"}
    return AutomationCore(
        name="geostream: a committed layout starts retrain",
        enabled=False,
        trigger=_each("geostream.layout.committed"),
        actions=[
            RunDeployment(
                deployment_id=deployment.id,
                parameters={
                    name: {"__prefect_kind": "jinja", "template": f"{{{{ event.resource['{label}'] }}}}"}
                    for name, label in labels.items()
                },
            )
        ],
    )


async def alerts(client: PrefectClient, block: str) -> list[AutomationCore]:
    """Return what sends a message by a notification block where a person has to look.

    That is when a flow run has failed, when one has crashed that is not started again, and when a model was rejected.

    Args:
        client: of the server that has the block.
        block: TYPE/NAME, such as "slack-webhook/on-call".

    Raises:
        ValueError: the server has no such block.
    """
    kind, _, name = block.partition("/")
    try:
        document = await client.read_block_document_by_name(name, kind)
    except ObjectNotFound as error:
        raise ValueError(f"{ALERT_BLOCK}={block}: the server has no such block; write TYPE/NAME") from error

    flow_ended = (
        "geostream: {{ flow.name }} {{ flow_run.state.name }}",
        "{{ flow_run.name }}: {{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
    )
    rejected = "geostream: model rejected", "{{ event.resource.name }}: {{ event.payload.rule }}"

    def alert(name: str, event: str, flows: list[str] | None, message: tuple[str, str]) -> AutomationCore:
        subject, body = message
        return AutomationCore(
            name=name,
            trigger=_each(event, _of(flows) if flows else None),
            actions=[SendNotification(block_document_id=document.id, subject=subject, body=body)],
        )

    others = [name for name in FLOWS if name != "retrain"]
    return [
        alert("geostream: alert when a flow has failed", "prefect.flow-run.Failed", FLOWS, flow_ended),
        alert(
            "geostream: alert when sharding or reclustering has crashed", "prefect.flow-run.Crashed", others, flow_ended
        ),
        alert("geostream: alert when a model was rejected", "geostream.model.rejected", None, rejected),
    ]


def _each(event: str, related: Related | None = None) -> EventTrigger:
    """Return what reacts to each such event at once, of any resource that is related as said."""
    return EventTrigger(
        expect={event},
        match_related=related or {},
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
        within=timedelta(0),
    )


def _of(flows: list[str]) -> Related:
    return {"prefect.resource.role": "flow", "prefect.resource.name": flows}


async def create(client: PrefectClient, block: str | None) -> list[str]:
    """Create the automations that are missing, update older ones, and leave alone whether they are switched on.

    Args:
        client: of the server.
        block: notification block for alerts, TYPE/NAME; None: no alert is created, and one that is there stays.

    Returns:
        A line for each automation that was created or updated.

    Raises:
        ValueError: the server has no such block.
    """
    wanted = [*lost(), again(), await on_layout(client)]
    wanted += await alerts(client, block) if block else []
    lines = []
    for automation in filter(None, wanted):
        automation.description = _described(automation)
        found = await client.read_automations_by_name(automation.name)
        if not found:
            await client.create_automation(automation)
            lines.append(f"created: {automation.name}{'' if automation.enabled else ' (switched off)'}")
        for one in found:
            if one.description != automation.description:
                automation.enabled = one.enabled
                await client.update_automation(one.id, automation)
                lines.append(f"updated: {automation.name}")
    return lines


def _described(automation: AutomationCore) -> str:
    """Return a description that changes with what the automation does."""
    what = automation.model_dump(mode="json", include={"trigger", "actions"})
    what["trigger"] = {
        name: sorted(value) if isinstance(value, list) and name in SETS else value
        for name, value in what["trigger"].items()
        if name != "id"
    }
    version = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    return f"Made by geostream, version {version}; see docs/operations.md."


def main() -> int:
    """Run the command line, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.automations", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--alert-block",
        default=os.environ.get(ALERT_BLOCK) or None,
        help=f"notification block TYPE/NAME for alerts, such as slack-webhook/on-call; default: ${ALERT_BLOCK}",
    )
    block = parser.parse_args().alert_block

    async def run() -> list[str]:
        async with get_client() as client:
            return await create(client, block)

    try:
        lines = asyncio.run(run())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines) or "automations: all are there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
