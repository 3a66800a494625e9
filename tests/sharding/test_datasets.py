"""The list of data sets says the same everywhere, and all that a person wants to know before a download."""

from __future__ import annotations

from pathlib import Path

import pytest

from sharding import ADAPTERS
from sharding.cli import NAMES
from sharding.datasets import datasets, page
from sharding.simcity.layouts import LAYOUTS

ROOT = Path(__file__).parents[2]


def test_every_adapter_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    datasets()
    printed = capsys.readouterr().out
    for name, adapter in ADAPTERS.items():
        assert adapter.terms and adapter.holds and adapter.files
        for fact in (name, adapter.source, adapter.terms, adapter.holds, adapter.files):
            assert fact in printed
    assert tuple(NAMES.split(", ")) == tuple(ADAPTERS)
    assert set(LAYOUTS) == set(ADAPTERS) - {"table"}, "a folder of each can be rendered"


def test_the_page_is_made_from_the_same_facts() -> None:
    assert (ROOT / "docs" / "datasets.md").read_text() == page(), "run: python -m sharding.datasets > docs/datasets.md"
