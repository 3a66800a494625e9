"""A real Prefect server on loopback, with a database and settings of its own.

Decides that nothing of the user's own Prefect (``~/.prefect``, profiles, a server on port 4200) is touched. It costs
one process of about 230 MB, and 10–25 s at the first start, when the database is created; 5–8 s later.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from geostream.errors import GeostreamError
from infra.process import LOOPBACK, Child, choose_ports, end, spawn, wait_until

DEFAULT_PORT = 4200
ATTEMPTS = 3


def without_prefect(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment less every PREFECT_* setting, which could point to another server, and with reporting off."""
    kept = {name: value for name, value in environment.items() if not name.startswith("PREFECT_")}
    return {**kept, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class PrefectServer:
    """A running server: what is needed to use it and to end it."""

    child: Child
    port: int
    home: str

    @property
    def url(self) -> str:
        """Where its pages are, for a browser."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def api_url(self) -> str:
        return f"{self.url}/api"

    def environment(self) -> dict[str, str]:
        """With these variables every Prefect command and flow uses this server, and its home for what it stores."""
        return {
            "PREFECT_API_URL": self.api_url,
            "PREFECT_HOME": self.home,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }

    def healthy(self) -> bool:
        """Whether our server (not another one on its port) answers."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"{self.api_url}/health", timeout=5) as response:
                answered = response.status == 200
        except (urllib.error.URLError, OSError):
            return False
        return answered and self.child.listens(self.port)

    def stop(self) -> None:
        """End the server; its database stays."""
        end(self.child)


def start_prefect(home: Path, *, timeout: float = 180.0, outlive: bool = False) -> PrefectServer:
    """Start a server with its database in ``home`` and its log in ``home``/server.log; returns when it is ready.

    Port 4200 if free, else another. ``outlive``: goes on without us. Raises GeostreamError with the end of its log.
    """
    home = home.absolute()  # the server runs in it, and a flow may run anywhere
    home.mkdir(parents=True, exist_ok=True)
    environment = {**without_prefect(os.environ), "PREFECT_HOME": str(home), "PREFECT_PLUGINS_ENABLED": "false"}
    for attempt in range(ATTEMPTS):  # no lock while it creates its database: if its port is gone by then, another one
        [port] = choose_ports([DEFAULT_PORT], use_preferred=attempt == 0)
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", str(port)]
        # Not in the checkout, whose settings files are for commands typed there.
        child = spawn(command, environment=environment, log=home / "server.log", folder=home, outlive=outlive)
        server = PrefectServer(child, port, str(home))
        try:
            problem = wait_until(server.healthy, child, "the local Prefect server", timeout)
        except BaseException:
            server.stop()
            raise
        if problem is None:
            return server
        slow = child.running()
        server.stop()
        if slow:
            break
    raise GeostreamError(f"{problem}; its log, {server.child.log}, ends with:\n{server.child.log_tail()}")


@contextmanager
def local_prefect(home: Path) -> Iterator[PrefectServer]:
    """A server for the length of a ``with`` block; Linux ends it also when we are killed."""
    server = start_prefect(home)
    try:
        yield server
    finally:
        server.stop()
