"""Start a Prefect server on loopback, with a database and settings of its own.

Nothing of the user's own Prefect (``~/.prefect``, profiles, a server on port 4200) is touched. A server is one process
of about 230 MB. Its first start takes 10–25 s, because the database is created; later ones take 5–8 s.
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
HEARTBEAT = 30  # seconds between two signs of life of a flow run on our workers, and the least that Prefect takes
ATTEMPTS = 3


#: Otherwise the server forgets, when it is started again, who holds a concurrency limit, and nobody ever frees it.
LEASES = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}


def without_prefect(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without PREFECT_* settings, which may name another server, and with reporting off."""
    kept = {name: value for name, value in environment.items() if not name.startswith("PREFECT_")}
    return {**kept, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}


@dataclass(frozen=True)
class PrefectServer:
    """Use and end a running server.

    Attributes:
        child: its process.
        port: that it listens on.
        home: absolute path of its folder, with database and log.
    """

    child: Child
    port: int
    home: str

    @property
    def url(self) -> str:
        """URL of its pages, for a browser."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def api_url(self) -> str:
        """URL of its API, for clients."""
        return f"{self.url}/api"

    def environment(self) -> dict[str, str]:
        """Return the variables with which Prefect commands and flows use this server and its home."""
        return {
            "PREFECT_API_URL": self.api_url,
            "PREFECT_HOME": self.home,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }

    def healthy(self) -> bool:
        """Return whether our server answers, not another one on its port."""
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


def start_prefect(
    home: Path, *, timeout: float = 180.0, outlive: bool = False, port: int = DEFAULT_PORT
) -> PrefectServer:
    """Start a server, and return when it is ready.

    Args:
        home: folder for its database and its log, ``server.log``.
        timeout: seconds that it may take.
        outlive: whether it goes on when this process ends.
        port: that it listens on, if it is free; another one otherwise.

    Raises:
        GeostreamError: it does not come up; the message has the end of its log.
    """
    home = home.absolute()  # the server runs in it, and a flow may run anywhere
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    environment = {**without_prefect(os.environ), "PREFECT_HOME": str(home), "PREFECT_PLUGINS_ENABLED": "false"}
    for attempt in range(ATTEMPTS):  # no lock while it creates its database: if its port is gone by then, another one
        [chosen] = choose_ports([port], use_preferred=attempt == 0)
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", LOOPBACK, "--port", str(chosen)]
        url = f"http://{LOOPBACK}:{chosen}"
        # Its pages ask the API at an address that it would take for that of port 4200; alerts link to its pages.
        own = environment | LEASES | {"PREFECT_SERVER_UI_API_URL": f"{url}/api", "PREFECT_UI_URL": url}
        # Not in the checkout, whose settings files are for commands typed there.
        child = spawn(command, environment=own, log=home / "server.log", folder=home, outlive=outlive)
        server = PrefectServer(child, chosen, str(home))
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
    """Run a server for the length of a ``with`` block; Linux ends it also when we are killed.

    Args:
        home: folder for its database and its log.
    """
    server = start_prefect(home)
    try:
        yield server
    finally:
        server.stop()
