"""A server that is away for a while: a training waits for it, with writes as with reads; a command says so soon."""

from __future__ import annotations

import threading
import time

import pytest

from geostream.errors import StoreError
from geostream.store import Store
from geostream.store.store import patience
from infra.process import choose_ports
from infra.s3 import S3Server
from tests.fault_proxy import FaultProxy

AWAY = 25.0  # seconds


@pytest.mark.slow
def test_a_write_outlasts_a_server_that_is_away(s3: S3Server, s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = FaultProxy(s3.endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    store = Store.open(s3_store.url)
    store.write("before", b"1")
    [port] = choose_ports([1], use_preferred=False)
    proxy.upstream = f"http://127.0.0.1:{port}"
    began = time.monotonic()
    with pytest.raises(StoreError, match="before"):
        store.write("before", b"2")
    assert time.monotonic() - began < AWAY
    back = threading.Timer(AWAY, lambda: setattr(proxy, "upstream", s3.endpoint))
    back.start()
    began = time.monotonic()
    with patience():
        store.write("after", b"3")
        assert AWAY - 1 < time.monotonic() - began < 2 * AWAY
        assert store.read("after") == b"3"
    back.join()
