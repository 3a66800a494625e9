"""Tasks on a Dask cluster of threads."""

from __future__ import annotations

import pytest

from geostream.errors import BadInput
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
