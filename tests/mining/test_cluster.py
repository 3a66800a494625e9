"""Tasks on a Dask cluster of threads."""

from __future__ import annotations

import time

import pytest

from geostream.errors import BadInput, GeostreamError
from geostream.mining import cluster
from geostream.mining.cluster import run_tasks


def square(number: int) -> int:
    if number > 90:
        raise BadInput(f"{number} is too much")
    return number * number


def test_all_results_come() -> None:
    assert sorted(run_tasks(None, square, range(9))) == [n * n for n in range(9)]
    assert list(run_tasks(None, square, [])) == []


def test_a_task_that_fails_raises_its_own_error() -> None:
    with pytest.raises(BadInput, match="91 is too much"):
        list(run_tasks(None, square, [1, 91]))


def test_a_scheduler_without_workers_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr(cluster, "LOOK_EVERY", 0.2)
    monkeypatch.setattr(cluster, "NO_WORKER", 0.6)
    with LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as local:
        with pytest.raises(GeostreamError, match=local.scheduler_address):
            list(run_tasks(local.scheduler_address, square, [1, 2]))
        local.scale(1)  # whoever brings workers in time gets results
        assert sorted(run_tasks(local.scheduler_address, square, [1, 2])) == [1, 4]


def test_a_scheduler_that_ends_in_the_middle_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    monkeypatch.setattr(cluster, "LOOK_EVERY", 0.5)
    local = LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0")
    results = run_tasks(local.scheduler_address, slowly, [0.0, 8.0])
    assert next(results) == 0.0
    local.close()
    began = time.monotonic()
    with pytest.raises(GeostreamError, match="Dask"):
        next(results)
    assert time.monotonic() - began < 60


def slowly(seconds: float) -> float:
    time.sleep(seconds)
    return seconds
