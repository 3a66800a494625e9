"""The benchmark of warm starts works, on cities far too small to say anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.warm import WEEKS, benchmark


@pytest.mark.slow
def test_both_trainings_are_measured_and_compared(tmp_path: Path) -> None:
    result = benchmark(tmp_path, side=5, rates=[])
    scratch, warm = result["rows"]
    assert set(result["pairs"]) == set(WEEKS) and result["pairs"]["week1"] < result["pairs"]["week2"]
    assert (scratch["run"], warm["run"]) == ("scratch", "warm") and warm["epochs"] < scratch["epochs"]
    assert scratch["current model's"] == warm["current model's"], "the same model, on the same gallery"
    assert 0 < warm["processor seconds"] < scratch["processor seconds"]
