"""What the stages of mining hold, in real Dask processes, against the bounds that their modules state."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from geostream.store import Store
from tests.mining.places import places, write_embeddings

MIB = 2**20
SLACK = 40 * MIB  # what libraries and the scheduler take in the course of time


def job(*arguments: Any) -> dict[str, Any]:
    """Run tests.mining.memory_job in a process of its own."""
    command = [sys.executable, "-m", "tests.mining.memory_job", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
def test_a_gps_graph_is_never_held(tmp_path: Path) -> None:
    """Its rows would take 230 MiB, and what the workers need of all places 10 MiB in each of them."""
    n, k, block, written = 200_000, 96, 4096, 8192
    held = job("gps", tmp_path, n, 0, k, f"gps.BLOCK={block}", f"gps.WRITTEN={written}")
    bound = max(40 * block * k + 40 * MIB, 18 * written * k)
    assert n * k * 12 > 2 * (bound + SLACK)
    assert held["worker"] < bound + SLACK
    assert held["client"] < 80 * n + SLACK


@pytest.mark.slow
def test_vectors_and_finds_are_held_in_blocks(tmp_path: Path) -> None:
    """All vectors would take 2 × 59 MiB, all finds 44 MiB."""
    n, dim, k, block, queries, written = 60_000, 256, 96, 4096, 1024, 4096
    write_embeddings(Store.open(tmp_path), places(n), dim)
    constants = [f"{module}.BLOCK={block}" for module in ("exact", "approximate")]
    constants += [f"{module}.QUERIES={queries}" for module in ("exact", "approximate")]
    constants += [f"approximate.WRITTEN={written}", "ivf.PARTITION=2048", "ivf.MOST_TRAINED_ON=4096"]
    held = job("visual", tmp_path, n, dim, k, *constants)
    assert held["search"]["mode"] == "approximate" and held["search"]["recall"] >= 0.99
    bound = 4 * block * dim * 4 + 6 * queries * k * 8 + 4 * written * k * 8
    assert held["worker"] < bound + SLACK < 2 * n * dim * 4
    assert held["client"] < (20 + 8 + 30) * n + SLACK
