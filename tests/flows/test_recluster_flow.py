"""The flow ``recluster`` by its deployment's bare name, on a server and a worker, against a real S3."""

from __future__ import annotations

import json

import httpx
import pytest

from flows.common import open_store
from geostream.layout import open_layout
from geostream.layout.verify import verify_layout
from infra.stack import FOLDER, Stack
from tests.conftest import Checkout
from tests.helpers import tiny_layout
from tests.reclustering.test_recluster import embedded


@pytest.mark.slow
def test_the_deployment_writes_the_next_generation_and_shows_it(
    stack: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = Stack.load(stack.folder / FOLDER)
    for name, value in state.environment().items():
        monkeypatch.setenv(name, value)
    store = open_store(None).child("reclustering")
    before = tiny_layout(store, places=24, name="base")
    embedded(before, store, "first")
    parameters = ["-p", f"store={store.url}", "-p", "run=first"]
    done = stack.run("prefect", "deployment", "run", "recluster", "--watch", *parameters)
    assert done.returncode == 0, done.stdout + done.stderr
    after = open_layout(store)
    assert (after.name, after.info["parent"]) == ("base-g1", before.id) and verify_layout(after).count == 0
    assert state.prefect is not None
    body = {"artifacts": {"key": {"any_": ["generations"]}}}
    answer = httpx.post(f"{state.prefect.api_url}/artifacts/filter", json=body, trust_env=False, timeout=30)
    [artifact] = answer.raise_for_status().json()
    rows = json.loads(artifact["data"])
    assert [row["layout"] for row in rows] == ["base", "base-g1"]
    assert rows[1]["likeness in a shard"] > rows[0]["likeness in a shard"]
