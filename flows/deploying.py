"""Keep what people have set on a deployment when it is deployed again: the build step of ``prefect.yaml``.

``prefect deploy`` takes what prefect.yaml does not say for "none": an update would start a paused deployment again,
and remove the concurrency limits and tags that were set on its page. What it does say of schedules it would put in
place of the schedules that are there. All of this is the state of an operation, not code. So it is left out of every
update, and prefect.yaml only says what a deployment begins with.

Prefect runs build steps in the process that deploys. ``PrefectClient.update_deployment``, a public method, is wrapped
there; ``tests/infra/test_deploying.py`` sees on a real server that it is still the one that deploying calls.
"""

from __future__ import annotations

from functools import wraps
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentUpdate

KEPT = {"schedules", "paused", "tags", "concurrency_limit", "concurrency_options", "work_queue_name"}
MARK = "_keeps_operational_state"


def keep_operational_state() -> dict[str, Any]:
    """Leave schedules, pause, tags, concurrency and queue out of every later update of a deployment in this process."""
    before = PrefectClient.update_deployment
    if hasattr(before, MARK):
        return {}

    @wraps(before)
    async def update(self: PrefectClient, deployment_id: UUID, deployment: DeploymentUpdate) -> None:
        values = deployment.model_dump(exclude_unset=True, exclude=KEPT)
        now = await self.read_deployment(deployment_id)
        if values.get("work_pool_name") == now.work_pool_name:
            values.pop("work_pool_name", None)  # named without a queue, it would mean the pool's default queue
        await before(self, deployment_id, DeploymentUpdate(**values))

    setattr(update, MARK, True)
    PrefectClient.update_deployment = update  # type: ignore
    return {}
