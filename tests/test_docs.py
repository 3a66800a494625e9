"""The documentation names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)?(?:::(test_\w+))?`")


def test_each_promise_names_a_test_that_is_there() -> None:
    file, found = Path(), 0
    for path, test in NAMED.findall((ROOT / "docs" / "guarantees.md").read_text()):
        if not path and not test:
            continue
        file = ROOT / path if path else file
        assert file.is_file(), path
        assert not test or re.search(rf"^def {test}\(", file.read_text(), re.MULTILINE), f"{path}::{test}"
        found += 1
    assert found > 20
