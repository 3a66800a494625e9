"""Run an S3 server, a Dask cluster, a Prefect server and its worker on this machine, for as long as wanted.

``python -m infra.stack up`` starts what is missing and leaves alone what runs. ``down`` ends exactly the processes that
``up`` started, and keeps the data. ``status`` tells what runs. The stack belongs to the checkout that it is started in:
its data, logs, pids and credentials lie in ``runs/stack`` there, which only its owner may read. A server that has died
is started again at its old address, so that the worker goes on, and with it a training that waits for the server.

The worker runs one flow at a time: two trainings would only slow each other down here, and ``retrain`` queued behind
``shard-vigor`` finds its layout. Flows mine, recluster and evaluate on the Dask cluster: $DASK_SCHEDULER_ADDRESS is set
for them.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from geostream.errors import GeostreamError
from geostream.runs.launch import KILL_TIMEOUT
from infra.dask_cluster import DEFAULT_PORTS, DaskCluster, start_scheduler, start_workers, without_dask
from infra.prefect_server import DEFAULT_PORT, HEARTBEAT, PrefectServer, start_prefect, without_prefect
from infra.process import Child, end, spawn, wait_until
from infra.s3 import Credentials, S3Server, start_s3, without_aws

FOLDER = Path("runs", "stack")
WORKER = "geostream-local"
WORKER_TIMEOUT = 180.0
WORKER_GRACE = KILL_TIMEOUT + 15.0  # seconds for the worker to end: a training writes a checkpoint first


@dataclass
class Stack:
    """Record what ``up`` started, in ``runs/stack/stack.json`` (mode 600, because it holds the credentials).

    Attributes:
        folder: ``runs/stack`` of the checkout.
        s3: the S3 server; None: not started.
        dask: the Dask scheduler and its workers; None: not started.
        prefect: the Prefect server; None: not started.
        worker: the Prefect worker; None: not started.
        deployed: hash of what the deployments were made from.
    """

    folder: Path
    s3: S3Server | None = None
    dask: DaskCluster | None = None
    prefect: PrefectServer | None = None
    worker: Child | None = None
    deployed: str = ""

    @classmethod
    def load(cls, folder: Path) -> Stack:
        """Return the recorded stack; an empty one where nothing is recorded.

        Args:
            folder: ``runs/stack`` of the checkout.

        Raises:
            GeostreamError: the record is damaged.
        """
        try:
            state: dict[str, Any] = json.loads((folder / "stack.json").read_text())
        except FileNotFoundError:
            return cls(folder)
        except ValueError as error:
            raise GeostreamError(
                f"{folder / 'stack.json'}: damaged ({error}); end its processes by hand and remove the file"
            ) from error
        s3, prefect, worker = state["s3"], state["prefect"], state["worker"]
        dask = state.get("dask")  # an older record has none
        return cls(
            folder,
            s3 and S3Server(Child(**s3["child"]), s3["ports"], s3["bucket"], Credentials(**s3["credentials"])),
            dask
            and DaskCluster(
                Child(**dask["scheduler"]), dask["ports"], dask["folder"], [Child(**one) for one in dask["workers"]]
            ),
            prefect and PrefectServer(Child(**prefect["child"]), prefect["port"], prefect["home"]),
            worker and Child(**worker),
            state["deployed"],
        )

    def save(self) -> None:
        """Write the record, and the file of variables; remove both when nothing is left."""
        parts = {"s3": self.s3, "dask": self.dask, "prefect": self.prefect, "worker": self.worker}
        if not any(parts.values()):
            (self.folder / "stack.json").unlink(missing_ok=True)
            self.environment_file.unlink(missing_ok=True)
            return
        state: dict[str, Any] = {name: part and asdict(part) for name, part in parts.items()}
        state["deployed"] = self.deployed
        # For whoever only wants to know where the server is.
        state["prefect_api_url"] = self.prefect and self.prefect.api_url
        _write_private(self.folder / "stack.json", json.dumps(state, indent=1) + "\n")
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in self.environment().items()]
        _write_private(self.environment_file, "".join(lines))

    @property
    def environment_file(self) -> Path:
        """File to source in a shell, so that commands find the stack."""
        return self.folder / "env"

    def environment(self) -> dict[str, str]:
        """Return the variables with which commands and flows find the stack."""
        found: dict[str, str] = {}
        if self.s3:
            found |= {**self.s3.environment(), "GEOSTREAM_STORE": self.s3.url}
        if self.dask:
            found |= self.dask.environment()
        if self.prefect:
            found["PREFECT_API_URL"] = self.prefect.api_url
        return found

    def alive(self) -> dict[str, bool]:
        """Return for each part, by its name, whether it runs and answers."""
        return {
            "S3 server": self.s3 is not None and self.s3.healthy(),
            "Dask scheduler": self.dask is not None and self.dask.healthy(),
            "Dask workers": self.dask is not None and self.dask.complete(),
            "Prefect server": self.prefect is not None and self.prefect.healthy(),
            "worker": self.worker is not None and self.worker.running(),
        }


def _write_private(path: Path, text: str) -> None:
    """Replace the file atomically; only its owner may read it, from the first byte on."""
    draft = path.with_name(path.name + ".new")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
    draft.replace(path)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Let a second ``up`` or ``down`` wait for the first, so that nothing is started twice."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def up(checkout: Path) -> Stack:
    """Start what does not run yet, and deploy ``prefect.yaml`` if it or a flow has changed.

    Args:
        checkout: folder that holds ``prefect.yaml``.

    Raises:
        GeostreamError: there is no ``prefect.yaml``, a server does not come up, or Prefect refuses.
    """
    if not (checkout / "prefect.yaml").exists():
        raise GeostreamError(f"{checkout}: no prefect.yaml here; run this in the checkout of geostream")
    folder = checkout / FOLDER
    with _only_one(folder):
        stack = Stack.load(folder)
        before = _addresses(stack)
        if stack.s3 is None or not stack.s3.healthy():
            _say("S3 server: starting")
            # Not the user's own AWS credentials: these are written down.
            credentials, ports = (stack.s3.credentials, stack.s3.ports) if stack.s3 else (Credentials.random(), None)
            if stack.s3:
                stack.s3.stop()
            stack.s3 = start_s3(folder / "s3", credentials=credentials, outlive=True, ports=ports)
            stack.save()
        _start_dask(stack, s3_moved=bool(before) and before.get("AWS_ENDPOINT_URL") != stack.s3.endpoint)
        if stack.prefect is None or not stack.prefect.healthy():
            _say("Prefect server: starting (the first time it creates its database: up to half a minute)")
            if stack.prefect:
                stack.prefect.stop()
            port = stack.prefect.port if stack.prefect else DEFAULT_PORT
            stack.prefect = start_prefect(folder / "prefect", outlive=True, port=port)
            stack.save()
        if stack.worker is not None and (before != _addresses(stack) or not stack.worker.running()):
            end(stack.worker, WORKER_GRACE)  # it knows only where the servers were
            stack.worker = None
        if stack.worker is None:
            _say("worker: starting")
            stack.worker = _start_worker(stack)  # it creates the work pool where there is none
            stack.save()
            _wait_for_worker(stack.worker)
        if stack.deployed != (now := _deployable(checkout)):
            _say("deployments: creating or updating")
            _run(stack, checkout, "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "prefect.yaml")
            _run(stack, checkout, "infra.automations")
            stack.deployed = now
            stack.save()
    return stack


def down(checkout: Path) -> bool:
    """End what ``up`` started, the worker first; return whether there was anything. Data and logs stay."""
    folder = checkout / FOLDER
    if not folder.exists():
        return False
    with _only_one(folder):
        stack = Stack.load(folder)
        found = any((stack.worker, stack.prefect, stack.dask, stack.s3))
        if stack.worker:
            end(stack.worker, WORKER_GRACE)
            stack.worker = None
            stack.save()
        if stack.prefect:
            stack.prefect.stop()
            stack.prefect = None
            stack.save()
        if stack.dask:
            stack.dask.stop()
            stack.dask = None
            stack.save()
        if stack.s3:
            stack.s3.stop()
            stack.s3 = None
        stack.save()
    return found


def _addresses(stack: Stack) -> dict[str, str]:
    """Return what the worker knows of the servers: where they are, and its credentials."""
    return stack.environment()


def _start_dask(stack: Stack, *, s3_moved: bool) -> None:
    """Start what is missing of the Dask cluster."""
    environment = {**without_dask(without_prefect(without_aws(os.environ))), **stack.environment()}
    ports = stack.dask.ports if stack.dask else DEFAULT_PORTS
    if stack.dask and (s3_moved or not stack.dask.healthy()):
        stack.dask.stop()  # workers know only where the S3 server was
        stack.dask = None
    if stack.dask is None:
        _say("Dask scheduler: starting")
        stack.dask = start_scheduler(stack.folder / "dask", environment=environment, outlive=True, ports=ports)
        stack.save()
    if not stack.dask.complete():
        _say("Dask workers: starting")
        stack.dask = start_workers(stack.dask, environment=environment, outlive=True)
        stack.save()


def _environment(stack: Stack) -> dict[str, str]:
    """Return the variables of the worker and the deploying command: the stack's servers and no others."""
    assert stack.prefect is not None
    return {
        **without_dask(without_prefect(without_aws(os.environ))),
        **stack.environment(),
        **stack.prefect.environment(),
        "PREFECT_PLUGINS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",  # of a server on this machine one may ask more often than every 10 s
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT),
        "PREFECT_LOGGING_EXTRA_LOGGERS": "geostream,sharding,flows",
        # The worker starts flows with "python": the one that runs this.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }


def _run(stack: Stack, checkout: Path, *module: str) -> None:
    """Run a Python module with arguments; raise GeostreamError with its output where it fails."""
    command = [sys.executable, "-m", *module]
    done = subprocess.run(command, cwd=checkout, env=_environment(stack), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        output = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise GeostreamError(f"{' '.join(module)} failed:\n{output}")


def _deployable(checkout: Path) -> str:
    """Return the hash of what deployments and automations are made from."""
    automations = Path(__file__).with_name("automations.py")
    files = [checkout / "prefect.yaml", *sorted((checkout / "flows").glob("*.py")), automations]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def _start_worker(stack: Stack) -> Child:
    command = [sys.executable, "-m", "infra.worker", "--name", WORKER, "--limit", "1"]
    home = stack.folder / "prefect"
    log = home / "worker.log"
    if log.exists():
        log.replace(home / "worker.previous.log")  # what an earlier worker said must not count for this one
    return spawn(command, environment=_environment(stack), log=log, folder=home, outlive=True)


def _wait_for_worker(worker: Child) -> None:
    problem = wait_until(lambda: "started!" in worker.log_tail(), worker, "the worker", WORKER_TIMEOUT)
    if problem is not None:
        raise GeostreamError(f"{problem}; its log, {worker.log}, ends with:\n{worker.log_tail()}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _report(stack: Stack) -> None:
    assert stack.s3 is not None and stack.dask is not None and stack.prefect is not None
    here = "" if shutil.which("prefect") else "source .venv/bin/activate\n  "
    print(
        f"""The stack runs:
  S3 server       {stack.s3.endpoint}  bucket {stack.s3.bucket}
  Dask            {stack.dask.address}  dashboard {stack.dask.dashboard}
  Prefect server  {stack.prefect.url}
  worker          {WORKER}, one flow at a time
  logs and data   {stack.folder}

Next, here in the checkout:
  {here}prefect deployment run shard-vigor --watch   # renders and shards a city; -p raw=/path/to/VIGOR takes yours
  prefect deployment run retrain --watch       # trains on what is sharded
  source {stack.environment_file}   # lets geostream and any S3 client reach the store ($GEOSTREAM_STORE) and Dask
  make down                                    # ends it; the data stay"""
    )


def main() -> int:
    """Run the command line, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m infra.stack", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=["up", "down", "status"])
    command = parser.parse_args().command
    checkout = Path.cwd()
    try:
        if command == "up":
            _report(up(checkout))
        elif command == "down":
            print("The stack is down; its data stay." if down(checkout) else "The stack was not up.")
        else:
            stack = Stack.load(checkout / FOLDER)
            alive = stack.alive()
            for part, runs in alive.items():
                print(f"{part:15} {'runs' if runs else 'does not run'}")
            if stack.dask and alive["Dask scheduler"]:
                print(f"Dask dashboard  {stack.dask.dashboard}")
            return 0 if all(alive.values()) else 1
    except GeostreamError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
