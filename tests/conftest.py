"""What every test shares: no network, one real S3 server for the session, and one whole stack."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadFileScheduling

# Before anything imports a library that reads them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_PLUGINS_ENABLED="false",  # the plugin is for the command line, and tested there
    OMP_NUM_THREADS="1",  # tiny networks are fastest on one thread, above all while other tests run
)

from geostream.store import Store
from infra.prefect_server import without_prefect
from infra.s3 import S3Server, local_s3, without_aws

ROOT = Path(__file__).parents[1]


STACK = (
    "tests/flows/test_flows.py",
    "tests/flows/test_recluster_flow.py",
    "tests/flows/test_restarts.py",
    "tests/flows/test_retrain_flow.py",
    "tests/infra/test_deploying.py",
    "tests/infra/test_stack.py",
)


class FilesTogether(LoadFileScheduling):
    """Give each process of pytest-xdist whole files, and those that use the stack to one: its start takes a minute."""

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return "stack" if file in STACK else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FilesTogether:
    """Replace the scheduler that ``--dist`` names."""
    return FilesTogether(config, log)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use a server, and those of the stack, which are slow; begin with the longest, the stack's."""
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if {"s3", "checkout"} & fixtures:
            item.add_marker("server")
        if "checkout" in fixtures:
            item.add_marker("slow")
    items.sort(key=lambda item: item.nodeid.split("::")[0] not in STACK)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server; the session's environment points to it, and to it alone."""
    with local_s3(tmp_path_factory.mktemp("s3")) as server, pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - without_aws(os.environ).keys():
            patch.delenv(name)
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def s3_store(s3: S3Server) -> Store:
    """An empty folder on the S3 server, for one test."""
    return Store.open(f"{s3.url}/{uuid.uuid4().hex}")


@dataclass(frozen=True)
class Checkout:
    """A folder that is to the commands what the checkout is, with a ``runs`` folder of its own."""

    folder: Path

    def run(self, *command: str, timeout: float = 240.0, **variables: str) -> subprocess.CompletedProcess[str]:
        """A command typed there, in a shell that knows nothing of S3 and Prefect but the installed ``prefect``."""
        scripts = sysconfig.get_path("scripts")
        environment = without_prefect(without_aws(os.environ))
        return subprocess.run(
            [str(Path(scripts, command[0])) if command[0] == "prefect" else command[0], *command[1:]],
            cwd=self.folder,
            env={**environment, "PATH": os.pathsep.join([scripts, os.environ["PATH"]]), "PYTHONPATH": str(ROOT)}
            | variables,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def stack(self, command: str) -> subprocess.CompletedProcess[str]:
        """``make up``, ``make down`` or ``make status``."""
        return self.run(sys.executable, "-m", "infra.stack", command)


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    """A checkout of the tests' own; whatever is up there is taken down at the end."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("flows", "prefect.yaml", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    made = Checkout(folder)
    yield made
    made.stack("down")


@pytest.fixture(scope="module")
def stack(checkout: Checkout) -> Checkout:
    """The checkout with its stack up: S3, Prefect server, worker, deployments. The same for all modules."""
    up = checkout.stack("up")
    assert up.returncode == 0, up.stderr
    return checkout
