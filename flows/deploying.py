"""Change how Prefect deploys: the build steps of ``prefect.yaml``.

One step keeps what people have set on a deployment when it is deployed again. ``prefect deploy`` takes what
prefect.yaml does not say for "none": an update would start a paused deployment again, and remove the concurrency limits
and tags that were set on its page. What it does say of schedules it would put in place of the schedules that are there.
All of this is the state of an operation, not code. So it is left out of every update, and prefect.yaml only says what a
deployment begins with.

The other step narrows a deployment's schema of parameters to what it is for (:func:`flows.parameters.narrowed`). So a
parameter with a wrong name is refused when a flow run is created.

Prefect runs build steps in the process that deploys. ``PrefectClient.create_deployment`` and ``update_deployment``,
public methods, are wrapped there; ``tests/infra/test_deploying.py`` sees on a real server that deploying still calls
them.
"""

from __future__ import annotations

from functools import wraps
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentUpdate

from flows.parameters import narrowed

KEPT = {
    *("schedules", "paused", "tags", "concurrency_limit", "concurrency_options", "work_queue_name"),
    "job_variables",  # such as the number of GPUs of a Kubernetes job
}
# Marks of the wrapped methods: build steps run once for each deployment.
KEEPS = "_keeps_operational_state"
NARROWS = "_narrows_parameters"


def keep_operational_state() -> dict[str, Any]:
    """Leave what is KEPT out of every later update of a deployment in this process."""
    before = PrefectClient.update_deployment
    if hasattr(before, KEEPS):
        return {}

    @wraps(before)
    async def update(self: PrefectClient, deployment_id: UUID, deployment: DeploymentUpdate) -> None:
        values = deployment.model_dump(exclude_unset=True, exclude=KEPT)
        now = await self.read_deployment(deployment_id)
        if values.get("work_pool_name") == now.work_pool_name:
            values.pop("work_pool_name", None)  # named without a queue, it would mean the pool's default queue
        await before(self, deployment_id, DeploymentUpdate(**values))

    setattr(update, KEEPS, True)
    PrefectClient.update_deployment = update  # type: ignore
    return {}


def narrow_parameters() -> dict[str, Any]:
    """Narrow the schema of parameters of every deployment that this process creates or updates later."""
    created, updated = PrefectClient.create_deployment, PrefectClient.update_deployment
    if hasattr(created, NARROWS):
        return {}

    @wraps(created)
    async def create(self: PrefectClient, **values: Any) -> UUID:
        return await created(self, **_narrowed(values))

    @wraps(updated)
    async def update(self: PrefectClient, deployment_id: UUID, deployment: DeploymentUpdate) -> None:
        values = deployment.model_dump(exclude_unset=True)
        await updated(self, deployment_id, DeploymentUpdate(**_narrowed(values)))

    setattr(create, NARROWS, True)
    PrefectClient.create_deployment = create  # type: ignore
    PrefectClient.update_deployment = update  # type: ignore
    return {}


def _narrowed(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a deployment with its schema of parameters narrowed, where they have one."""
    schema = values.get("parameter_openapi_schema")
    if not schema:
        return values
    return {**values, "parameter_openapi_schema": narrowed(schema, values.get("parameters") or {})}
