"""What every test shares: no network, and one real S3 server for the whole session."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator

import pytest

# Before anything imports a library that reads them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    DO_NOT_TRACK="1",
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_PLUGINS_ENABLED="false",  # the plugin is for the command line, and tested there
)

from geostream.store import Store
from infra.s3 import S3Server, local_s3, without_aws


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
