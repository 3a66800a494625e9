"""What the streaming benchmark makes of its measurements, and that no peer meets anything that we have started."""

from __future__ import annotations

import subprocess
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store
from rich.console import Console

import geostream.store  # noqa: F401  # so that this process is no place for a peer
from infra.s3 import local_s3
from tests.benchmarks import stream
from tests.benchmarks.job import Job, check_alone
from tests.benchmarks.measure import ROOT, Failed
from tests.benchmarks.traffic import parse, read_traffic

PAIRS = 500  # two full shards and a bit: as few as two lanes can have


def test_geostream_is_compared_with_the_best_of_all_peers() -> None:
    rates = dict.fromkeys(stream.PEERS, 100.0) | {"geostream": 330.0, "lancedb": 220.0, "limit_decode": 440.0}
    raw = {name: [{"pairs_per_s": rate}] for name, rate in rates.items()}
    raw["geostream"][0] |= {"amplification": 1.02, "requests_per_gib": 36.0, "first_batch_s": 1.0}
    made = stream.figures(raw)["end_to_end_of_best_peer"]
    assert made["best_peer"] == "lancedb"
    assert made["value"] == pytest.approx(1.5) and made["met"] and made["bound_by_decoding"] == pytest.approx(2.0)
    del raw["mosaic"]
    assert "end_to_end_of_best_peer" not in stream.figures(raw)


def test_only_gets_that_were_answered_are_counted() -> None:
    text = (
        "# HELP SeaweedFS_s3_request_total Counter\n"
        'SeaweedFS_s3_request_total{bucket="b",code="200",type="GET"} 3\n'
        'SeaweedFS_s3_request_total{bucket="b",code="206",type="GET"} 40\n'
        'SeaweedFS_s3_request_total{bucket="b",code="404",type="GET"} 5\n'
        'SeaweedFS_s3_request_total{bucket="b",code="200",type="PUT"} 6\n'
        'SeaweedFS_s3_bucket_traffic_sent_bytes_total{bucket="b"} 1.25e+07\n'
    )
    assert parse(text) == (43, 12_500_000)


def test_the_server_counts_what_it_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with local_s3(tmp_path, metrics=True) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        store = S3Store("geostream", client_options={"allow_http": True})
        obstore.put(store, "x", bytes(300_000))
        before = read_traffic(server.metrics_url)
        obstore.get(store, "x").bytes()
        obstore.get_range(store, "x", start=7, length=1000)
        assert read_traffic(server.metrics_url).since(before) == (2, 301_000)


def test_a_process_with_our_packages_is_refused_to_a_peer() -> None:
    with pytest.raises(RuntimeError, match="geostream"):
        check_alone()


@pytest.mark.slow  # each imports its own torch, or as much
@pytest.mark.parametrize("name", stream.PEERS)
def test_a_peers_process_imports_none_of_our_packages(name: str) -> None:
    peer = stream.CONTESTANTS[name]
    if peer.version() is None:
        pytest.skip(f"{peer.package} is not installed")
    program = f"import {peer.path}; from tests.benchmarks.job import Job, check_alone; check_alone()"
    subprocess.run([peer.python, "-c", program], check=True, cwd=ROOT)


def test_a_peer_that_leaves_pairs_out_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handed_over = {"pairs": 71, "pairs_per_s": 1.0}
    monkeypatch.setattr(stream, "run", lambda *_: dict(handed_over))
    with local_s3(tmp_path / "s3", metrics=True) as server:
        job = Job(server.url, [], "", "", stream.BATCH, stream.WORKERS, (8, 8), (8, 16))
        site = stream.Site(tmp_path, server, {}, job, pairs=200, pair_bytes=1000.0)
        with pytest.raises(Failed, match="71 of 200"):
            stream.once(site, stream.CONTESTANTS["webdataset"])
        assert stream.once(site, stream.CONTESTANTS["geostream"])["amplification"] == 0  # its plan may leave some out
        handed_over["pairs"] = 72  # all but the last batch of each worker
        assert stream.once(site, stream.CONTESTANTS["webdataset"])["requests"] == 0
    assert not (tmp_path / "scratch").exists()


@pytest.mark.slow
def test_what_is_fetched_comes_to_what_was_stored() -> None:
    names = ["limit_fetch", "geostream_transport", "webdataset"]
    found = stream.benchmark(names, PAIRS, 1, Console(quiet=True))["contestants"]
    assert 1.0 <= found["limit_fetch"]["amplification"]["median"] < 1.1
    assert 1.0 <= found["webdataset"]["amplification"]["median"] < 1.1
    assert found["webdataset"]["pairs"]["median"] == PAIRS
    assert found["geostream_transport"]["requests"]["median"] > 1
