"""A dry run says what the store's server cannot promise, and what it would not allow."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from geostream.errors import StoreError
from geostream.store import Store
from geostream.store.conditional import PROBE
from infra.s3 import S3Server
from sharding import ShardOptions, dry_run, shard
from sharding.places import RawDataset
from tests.command import geostream
from tests.scripted_server import Answer, Bucket, Request, s3_error, scripted_server
from tests.streaming.test_faults import UserAdministration
from tests.vigor_raw import TWO

SMALL = ShardOptions(tile_size=(20, 20), view_size=(16, 32), shard_bytes=8000)
LISTING = b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>"


class Alibaba(Bucket):
    """A server that refuses conditional puts; it lists nothing."""

    def answer(self, request: Request) -> Answer:
        if request.is_conditional:
            return s3_error(
                501, "NotImplemented", "A header you provided implies functionality that is not implemented"
            )
        if request.method == "GET" and "list-type" in request.path:
            return Answer(200, LISTING)
        return super().answer(request)


def test_a_server_without_conditional_puts(
    raw: RawDataset, s3: S3Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The dry run tells of it, the real run goes through with one warning."""
    bucket = Alibaba()
    with scripted_server(bucket.answer) as server, caplog.at_level(logging.WARNING, "geostream"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        store = Store.open("s3://bucket/geo")
        plan = dry_run(raw, store, "vigor", options=SMALL)
        assert plan.refused is None and bucket.objects == {}
        [line] = [line for line in plan.remarks if "NotImplemented" in line]
        assert "s3://bucket" in line
        report = shard(raw, store, "vigor", options=SMALL, workers=1)
        assert f"{report.layout.store.url}/layout.json".removeprefix("s3://bucket/") in bucket.objects
        assert not [name for name in bucket.objects if PROBE in name]
        assert "NotImplemented" not in " ".join(dry_run(raw, store, "vigor", options=SMALL).remarks)  # nothing to write
    assert [one.getMessage() for one in caplog.records] == [line]


def test_on_the_command_line(raw_folder: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    cities = [word for name, value in TWO.items() for word in (f"--{name.replace('_', '-')}", ",".join(value))]
    with scripted_server(Alibaba().answer) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        done = geostream("shard", "vigor", str(raw_folder), "s3://bucket/geo", *cities, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "NotImplemented" in done.stdout and "Traceback" not in done.stderr


def test_where_nothing_may_be_written(
    raw: RawDataset, s3: S3Server, s3_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's own user, who may read and list."""
    users = UserAdministration(s3)
    [reader] = users.add(1)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", reader.key)
        patch.setenv("AWS_SECRET_ACCESS_KEY", reader.secret)
        store = Store.open(s3_store.url)
        plan = dry_run(raw, store, "vigor", options=SMALL)
        assert plan.refused is not None and "AccessDenied" in plan.refused and "s3:PutObject" in plan.refused
        assert plan.figures["shards"] == len(plan.job.parts)
        with pytest.raises(StoreError, match="s3:PutObject"):
            shard(raw, store, "vigor", options=SMALL, workers=1)
    users.remove()
    assert s3_store.list() == []
