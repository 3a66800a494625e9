"""The local S3 server: real, private, several at once, and gone when its owner is."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from geostream.errors import GeostreamError, StoreError
from geostream.store import Store
from infra import s3 as s3_module
from infra.process import LOOPBACK, PORTS, choose_ports, is_free
from infra.s3 import DEFAULT_PORTS, Credentials, S3Server, local_s3, start_s3


def _point_to(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)


def test_two_servers_at_once_keep_apart(s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with local_s3(tmp_path) as second:
        assert not set(second.ports) & set(s3.ports)
        assert second.credentials != s3.credentials
        _point_to(second, monkeypatch)
        Store.open("s3://geostream/here").write("x", b"only in the second")
        assert second.environment()["AWS_ENDPOINT_URL"] == second.endpoint
        _point_to(s3, monkeypatch)
        assert not Store.open("s3://geostream/here").exists("x")
    assert not second.child.running()
    assert not list(Path("/tmp").glob(f"seaweedfs-*-{second.ports[0]}.sock"))


def test_data_survive_a_restart_with_other_ports_and_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for round_, content in enumerate([None, b"kept"]):
        with local_s3(tmp_path) as server, monkeypatch.context() as patch:
            for name, value in server.environment().items():
                patch.setenv(name, value)
            store = Store.open("s3://geostream/a")
            assert (store.read("x") if store.exists("x") else None) == content, round_
            store.write("x", b"kept")


def test_wrong_secret_and_no_credentials_are_refused(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    with pytest.raises(StoreError, match="refused") as failure:
        Store.open("s3://geostream").check()
    assert "wrong-secret" not in str(failure.value)


def test_secret_is_neither_shown_nor_an_argument(s3: S3Server) -> None:
    assert s3.credentials.secret not in repr(s3)
    assert s3.credentials.secret not in " ".join(psutil.Process(s3.child.pid).cmdline())


def test_only_loopback_listens(s3: S3Server) -> None:
    listening = [c.laddr for c in psutil.Process(s3.child.pid).net_connections() if c.status == psutil.CONN_LISTEN]
    assert {address.ip for address in listening} == {LOOPBACK}
    assert {address.port for address in listening} == set(s3.ports)


def test_ports_move_when_one_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not is_free(port)
        moved = choose_ports([port, PORTS[0]])
        assert port not in moved and len(set(moved)) == 2


@pytest.mark.slow
def test_port_taken_behind_the_lock_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody takes a port between our choice and the server's start: the next attempt moves all of them."""
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        doomed = [taken.getsockname()[1], *range(PORTS[0], PORTS[0] + 9)]
        real = choose_ports
        monkeypatch.setattr(
            s3_module,
            "choose_ports",
            lambda preferred, use_preferred: doomed if use_preferred else real(preferred, use_preferred=False),
        )
        server = start_s3(tmp_path)
    try:
        assert server.healthy() and doomed[0] not in server.ports
    finally:
        server.stop()


def test_failure_names_the_log_and_hides_the_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that prints its secret and ends, as a broken server might."""
    broken = tmp_path / "weed"
    broken.write_text('#!/bin/sh\necho "disk full, key $AWS_SECRET_ACCESS_KEY"\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setattr(s3_module, "weed_binary", lambda: str(broken))
    with pytest.raises(GeostreamError, match=r"s3\.log") as failure:
        start_s3(tmp_path / "s3", credentials=Credentials("KEY", "very-secret"))
    assert "disk full" in str(failure.value)
    assert "very-secret" not in str(failure.value)


def test_missing_binary_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.s3.sysconfig.get_path", lambda _: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GeostreamError, match=r"geostream\[local\]"):
        start_s3(tmp_path / "s3")


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal is Linux's")
@pytest.mark.slow
def test_server_ends_when_its_owner_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom infra.s3 import start_s3\n"
        "print(start_s3(Path(sys.argv[1])).child.pid, flush=True)\ntime.sleep(60)\n"
    )
    root = Path(s3_module.__file__).parents[1]
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert psutil.pid_exists(pid)
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    deadline = time.monotonic() + 15
    while psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(pid)


def _unsigned(method: str, port: int, path: str) -> tuple[int, bytes]:
    """Status and content of the answer to a request without credentials."""
    request = urllib.request.Request(f"http://{LOOPBACK}:{port}{path}", b"x" if method in "PUT POST" else None)
    request.method = method
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as refused:
        return refused.code, b""


def test_no_port_reads_writes_or_deletes_without_credentials(s3: S3Server, s3_store: Store) -> None:
    """The filer once gave every object to everybody on the machine, and the master deleted whole buckets."""
    s3_store.write("kept", content := b"only for those with the key " * 2000)
    folder = s3_store.url.removeprefix("s3://")
    for name, port in zip(DEFAULT_PORTS, s3.ports, strict=False):
        if name.endswith("grpc"):
            continue
        for path in (f"/buckets/{folder}", f"/{folder}"):
            assert content not in _unsigned("GET", port, f"{path}/kept")[1]
            for method, file in (("PUT", "new"), ("POST", "new"), ("DELETE", "kept")):
                assert _unsigned(method, port, f"{path}/{file}")[0] >= 400, (name, method)
    master, volume = (s3.ports[list(DEFAULT_PORTS).index(name)] for name in ("master.port", "volume.port"))
    for path in ("/dir/assign", "/submit", "/vol/grow?count=1", f"/col/delete?collection={s3.bucket}"):
        assert _unsigned("POST", master, path)[0] == 404, path
    for method in ("GET", "PUT", "POST", "DELETE"):
        assert _unsigned(method, volume, "/1,01637037d6")[0] == 401, method
    assert s3_store.read("kept") == content and [one.path for one in s3_store.list()] == ["kept"]
