"""``make up`` and ``make down``: up twice, half dead, down, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from geostream.errors import GeostreamError
from infra.process import MARK, Child, end, spawn
from infra.stack import FOLDER, Stack, up
from tests.conftest import Checkout


def _marked(marks: set[str]) -> list[psutil.Process]:
    """All live processes that the stack started, or that those did."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) in marks and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_up_again_leaves_what_runs_and_tells_no_secret(stack: Checkout) -> None:
    state = Stack.load(stack.folder / FOLDER)
    before = (stack.folder / FOLDER / "stack.json").read_text()
    again = stack.stack("up")
    assert again.returncode == 0, again.stderr
    assert (stack.folder / FOLDER / "stack.json").read_text() == before
    assert "prefect deployment run shard-vigor" in again.stdout and "starting" not in again.stderr
    assert state.s3 is not None
    assert state.s3.credentials.secret not in again.stdout + again.stderr
    for log in (stack.folder / FOLDER).glob("*/*.log"):
        assert state.s3.credentials.secret not in log.read_text(), log
    for name in ("stack.json", "env"):
        assert stat.S_IMODE((stack.folder / FOLDER / name).stat().st_mode) == 0o600


def test_only_the_owner_may_read_what_the_servers_write(stack: Checkout) -> None:
    folder = stack.folder / FOLDER
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    written = [path for part in ("s3", "prefect", "dask") for path in (folder / part).rglob("*") if path.is_file()]
    assert any(path.name == "prefect.db" for path in written) and any(path.suffix == ".dat" for path in written)
    # SeaweedFS opens its .vif files to all by itself; they hold nothing of the objects, and lie in the closed folder.
    assert not [path for path in written if path.stat().st_mode & 0o077 and path.suffix != ".vif"]


def test_env_file_can_be_sourced(stack: Checkout) -> None:
    state = Stack.load(stack.folder / FOLDER)
    shown = subprocess.run(
        ["sh", "-c", f". {state.environment_file}; env"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {f"{name}={value}" for name, value in state.environment().items()} <= set(shown)


@pytest.mark.slow
def test_half_dead_is_repaired_and_down_leaves_nothing(stack: Checkout) -> None:
    """The S3 server and the worker are killed outright; ``up`` brings both back, with the data, at the same address."""
    old = Stack.load(stack.folder / FOLDER)
    assert old.s3 and old.prefect and old.worker
    for child in (old.s3.child, old.worker):
        os.kill(child.pid, signal.SIGKILL)
    status = stack.stack("status")
    assert status.returncode == 1 and status.stdout.count("does not run") == 2

    assert old.dask and old.dask.dashboard in status.stdout

    repaired = stack.stack("up")
    assert repaired.returncode == 0, repaired.stderr
    new = Stack.load(stack.folder / FOLDER)
    assert new.s3 and new.prefect and new.worker
    assert (new.s3.ports, new.s3.credentials) == (old.s3.ports, old.s3.credentials)
    assert new.dask and new.dask.complete() and new.dask.workers == old.dask.workers
    assert new.prefect.child == old.prefect.child

    os.kill(new.s3.child.pid, signal.SIGKILL)  # alone: the worker, and a training on it, are left alone
    assert stack.stack("up").returncode == 0
    alone = Stack.load(stack.folder / FOLDER)
    assert alone.worker == new.worker
    assert alone.s3 and alone.s3.child != new.s3.child and alone.s3.endpoint == new.s3.endpoint
    new = alone
    assert new.s3 and new.prefect and new.worker and new.dask

    os.kill(new.dask.scheduler.pid, signal.SIGKILL)  # so is it with the scheduler: a training finds it again
    assert stack.stack("up").returncode == 0
    alone = Stack.load(stack.folder / FOLDER)
    assert alone.worker == new.worker and alone.dask and alone.dask.complete()
    assert alone.dask.scheduler != new.dask.scheduler and alone.dask.address == new.dask.address
    new = alone
    assert new.s3 and new.prefect and new.worker and new.dask
    assert stack.stack("status").returncode == 0

    dask = [child for one in (old.dask, new.dask) for child in (one.scheduler, *one.workers)]
    children = (old.s3.child, old.worker, new.s3.child, new.worker, new.prefect.child, *dask)
    marks = {child.mark for child in children}
    assert len(_marked(marks)) >= 6
    down = stack.stack("down")
    assert down.returncode == 0, down.stderr
    assert _marked(marks) == []
    assert (stack.folder / FOLDER / "s3" / "data").is_dir()
    assert not (stack.folder / FOLDER / "stack.json").exists() and not (stack.folder / FOLDER / "env").exists()
    assert stack.stack("down").stdout == "The stack was not up.\n"


def test_down_does_not_end_who_has_the_pid_now(tmp_path: Path) -> None:
    """The record names a live process that is not ours: a pid used again after a restart of the machine."""
    with subprocess.Popen(["sleep", "60"]) as stranger:
        child = Child(stranger.pid, 0.0, "not-its-mark", str(tmp_path / "log"))
        assert not child.running()
        end(child)
        assert stranger.poll() is None
        stranger.kill()


def test_offspring_that_lost_its_parent_is_ended_too(tmp_path: Path) -> None:
    script = "import subprocess, sys; subprocess.Popen(['sleep', '60'], start_new_session=True); print('x', flush=True)"
    child = spawn([sys.executable, "-c", script], environment=os.environ, log=tmp_path / "log")
    deadline = time.monotonic() + 10
    while child.running() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [process.name() for process in child.family()] == ["sleep"]
    end(child)
    assert child.family() == []


def test_stubborn_process_is_killed(tmp_path: Path) -> None:
    child = spawn(["sh", "-c", "trap '' TERM; sleep 60"], environment=os.environ, log=tmp_path / "log")
    time.sleep(0.2)
    end(child, grace=0.5)
    assert not child.running() and child.family() == []


def test_outside_of_a_checkout_says_so(tmp_path: Path) -> None:
    with pytest.raises(GeostreamError, match=r"prefect\.yaml"):
        up(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text(json.dumps({"s3": None})[:-3])
    with pytest.raises(GeostreamError, match=r"stack\.json: damaged"):
        Stack.load(tmp_path)
