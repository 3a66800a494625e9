"""A small VIGOR folder of two cities, one to train on and one to test on."""

from __future__ import annotations

from pathlib import Path

import pytest

from sharding import read_places
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
