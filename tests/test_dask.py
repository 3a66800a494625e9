"""Tasks on a Dask cluster of threads."""

from __future__ import annotations

import math
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
from joblib import cpu_count

from geostream import dask as cluster
from geostream.dask import connected, everywhere, run_tasks, scheduler_url, shared_connection, submit
from geostream.errors import BadInput, GeostreamError, Stalled


def square(number: int) -> int:
    if number > 90:
        raise BadInput(f"{number} is too much")
    return number * number


def test_all_results_come() -> None:
    assert sorted(run_tasks(None, square, range(9), "square")) == [n * n for n in range(9)]
    assert list(run_tasks(None, square, [], "square")) == []


def test_a_task_that_fails_raises_its_own_error() -> None:
    with pytest.raises(BadInput, match="91 is too much"):
        list(run_tasks(None, square, [1, 91], "square"))


def own_key(number: int) -> str:
    from distributed import get_worker

    time.sleep(0.01 * number)
    return str(get_worker().get_current_task())


def test_tasks_are_named_by_stage_and_part_and_run_each_time() -> None:
    """A dashboard takes the tasks of a stage together by what precedes the number."""
    from dask.utils import key_split

    keys = sorted(run_tasks(None, own_key, range(3), "plan-lane"))
    assert [key.rsplit("-", 1)[0] for key in keys] == ["plan-lane-0", "plan-lane-1", "plan-lane-2"]
    with connected(None, 1) as client:
        keys += [submit(client, "mine-block-0-12", own_key, 0).result() for _ in range(2)]
    assert len(set(keys)) == 5 and all(key.startswith("mine-block-0-12-") for key in keys[3:])
    assert {key_split(key) for key in keys} == {"plan-lane", "mine-block"}


def test_only_a_few_tasks_are_made_before_one_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may be large, so memory does not grow with their number."""
    made: list[int] = []

    class Tasks(Sequence[int]):
        def __len__(self) -> int:
            return 40

        def __getitem__(self, at: Any) -> Any:
            if at >= len(self):
                raise IndexError(at)
            made.append(at)
            return at

    results = run_tasks(None, square, Tasks(), "square")
    found = [next(results)]
    assert len(made) <= cluster.AHEAD * cpu_count() + 1 < 40
    assert sorted([*found, *results]) == [n * n for n in range(40)]


def test_calls_share_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a task failed; and where the scheduler was gone for long, they connect again."""
    from distributed import LocalCluster

    clients: list[Any] = []
    connect = cluster._client

    def noted(url: str) -> Any:
        clients.append(connect(url))
        return clients[-1]

    monkeypatch.setattr(cluster, "_client", noted)
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as local,
        shared_connection(local.scheduler_address, "plan") as apply,
    ):
        names = [*apply(own_key, [0]), *apply(partial(own_key), [0])]
        assert [name.rsplit("-", 1)[0] for name in names] == ["plan-own-key-0"] * 2
        with pytest.raises(BadInput, match="91 is too much"):
            list(apply(square, [91]))
        assert list(apply(square, [3])) == [9]
        assert len(clients) == 1
        clients[0].close()  # as Dask does in the end
        assert list(apply(square, [4])) == [16]
        assert len(clients) == 2


def test_the_scheduler_that_the_environment_names_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASK_SCHEDULER_ADDRESS", raising=False)
    assert scheduler_url(None) is None
    monkeypatch.setenv("DASK_SCHEDULER_ADDRESS", "tcp://of-the-environment:8786")
    assert scheduler_url(None) == "tcp://of-the-environment:8786"
    assert scheduler_url("tcp://given:8786") == "tcp://given:8786"
    assert scheduler_url("") is None


def test_a_scheduler_without_workers_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr(cluster, "LOOK_EVERY", 0.2)
    monkeypatch.setattr(cluster, "FIRST_WORKER", 0.6)
    with LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as local:
        with pytest.raises(GeostreamError, match=local.scheduler_address):
            list(run_tasks(local.scheduler_address, square, [1, 2], "square"))
        local.scale(1)  # whoever brings workers in time gets results
        assert sorted(run_tasks(local.scheduler_address, square, [1, 2], "square")) == [1, 4]


def test_a_scheduler_that_ends_in_the_middle_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr(cluster, "LOOK_EVERY", 0.5)
    local = LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0")
    results = run_tasks(local.scheduler_address, slowly, [0.0, 8.0], "slow")
    assert next(results) == 0.0
    local.close()
    began = time.monotonic()
    with pytest.raises(GeostreamError, match="Dask"):
        next(results)
    assert time.monotonic() - began < 60


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "LOOK_EVERY", 0.2)
    for name in ("NO_WORKER", "ALL_PAUSED"):
        monkeypatch.setattr(cluster, name, 1.0)
    monkeypatch.setattr(cluster, "NO_ANSWER", 5.0)  # on a busy machine an answer takes longer than one question waits
    monkeypatch.setattr(cluster, "TELL_EVERY", 0.5)
    monkeypatch.setattr(cluster, "COURTESY", 1.0)


@pytest.fixture
def scheduler() -> Iterator[subprocess.Popen[bytes]]:
    """A scheduler as a process of its own, with one worker."""
    program = (
        "from distributed import LocalCluster\n"
        "if __name__ == '__main__':\n"
        "    here = {'host': '127.0.0.1', 'protocol': 'tcp://', 'dashboard_address': '127.0.0.1:0'}\n"
        "    local = LocalCluster(n_workers=1, processes=False, **here)\n"
        "    print(local.scheduler_address, flush=True)\n"
        "    input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        yield process
        process.kill()


@pytest.mark.parametrize(
    "url", ["nowhere", "tcp://h:port", "tcp://h:99999", "tls://127.0.0.1:8786", "nothing://127.0.0.1:1"]
)
def test_what_is_no_url_of_a_scheduler_is_bad_input(url: str) -> None:
    """A flow tries again what is Stalled, and this would never come right."""
    with pytest.raises(BadInput, match=url), connected(url, 1):
        pass


def test_a_scheduler_that_is_stuck_is_given_up(
    scheduler: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It keeps its connections, and answers nothing: whatever is waited for then, results, one of them, or a call."""
    impatient(monkeypatch)
    assert scheduler.stdout is not None
    url = scheduler.stdout.readline().decode().strip()
    with pytest.raises(Stalled, match=url), connected(url, 1) as client:
        ready = client.submit(math.sqrt, 9, pure=False)
        assert ready.result() == 3
        late = client.submit(math.sqrt, 9, pure=False)
        scheduler.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        everywhere(client, time.time)  # is not worth a wait
        client.gather([ready, late])
    assert time.monotonic() - began < 60
    assert url in caplog.text


def test_one_result_is_not_waited_for_without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    impatient(monkeypatch)
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0") as local,
        pytest.raises(Stalled, match=f"{local.scheduler_address}.* no worker"),
        connected(local.scheduler_address, 1) as client,
    ):
        local.scale(0)
        client.sync(client.retire_workers)
        while client.sync(client.scheduler.ncores):
            time.sleep(0.05)
        client.submit(slowly, 0.0, pure=False).result()


def test_paused_workers_are_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are for good, where something else holds their memory."""
    from dask import config
    from distributed import LocalCluster

    impatient(monkeypatch)
    full = {f"distributed.worker.memory.{name}": share for name, share in MEMORY.items()}
    with (
        config.set(full),
        LocalCluster(n_workers=1, processes=False, memory_limit="4GB", dashboard_address="127.0.0.1:0") as local,
        connected(local.scheduler_address, 1) as client,
    ):
        while client.sync(client.scheduler.ncores_running):
            time.sleep(0.05)
        with pytest.raises(Stalled, match="paused"), connected(local.scheduler_address, 1) as other:
            other.submit(slowly, 0.0, pure=False).result()


MEMORY = {"target": False, "spill": False, "pause": 1e-6, "terminate": False}


def test_a_scheduler_that_only_connects_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of another kind at its address, or one that is stuck."""
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(GeostreamError, match=url):
            list(run_tasks(url, square, [1], "square"))
        assert time.monotonic() - began < 60


def slowly(seconds: float) -> float:
    time.sleep(seconds)
    return seconds
