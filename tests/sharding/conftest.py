"""A small VIGOR folder of two cities, one to train on and one to test on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sharding import read_places, web
from sharding.places import RawDataset
from tests.vigor_raw import TWO, write_city


@pytest.fixture
def raw_folder(tmp_path: Path) -> Path:
    for city in ("NewYork", "Chicago"):
        write_city(tmp_path / "raw", city)
    return tmp_path / "raw"


@pytest.fixture
def raw(raw_folder: Path) -> RawDataset:
    return read_places("vigor", raw_folder, **TWO)


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Requests to web servers are repeated three times, without pauses."""
    quick = web.RETRIES.new(total=3, backoff_factor=0.0, backoff_jitter=0.0)
    monkeypatch.setattr(web, "RETRIES", quick)
    web._connections.cache_clear()
    yield
    web._connections.cache_clear()
