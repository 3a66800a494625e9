"""Worker processes that cannot start or die say what to do; nothing hangs, and nothing is left running."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from geostream.layout import open_layout
from geostream.store import Store
from sharding.workers import in_order
from tests.vigor_raw import write_vigor

ROOT = Path(__file__).parents[2]
CALL = """
from geostream.store import Store
from sharding import ShardOptions, read_places, shard
def work():
    raw = read_places("vigor", {raw!r}, train_cities=["NewYork"], test_cities=["Chicago"])
    options = ShardOptions(tile_size=(20, 20), view_size=(16, 32), shard_bytes=8000)
    shard(raw, Store.open({store!r}), "vigor", options=options, workers=2)
"""


@pytest.mark.parametrize(
    ("how", "guard", "works"),
    [
        ("file", False, False),
        ("file", True, True),
        pytest.param("stdin", True, False, marks=pytest.mark.slow),
        pytest.param("-c", True, True, marks=pytest.mark.slow),
    ],
)
def test_a_script(tmp_path: Path, how: str, guard: bool, works: bool) -> None:
    write_vigor(tmp_path / "raw")
    text = CALL.format(raw=str(tmp_path / "raw"), store=str(tmp_path / "store"))
    text += 'if __name__ == "__main__":\n    work()\n' if guard else "work()\n"
    script = tmp_path / "script.py"
    script.write_text(text)
    command = {"file": [str(script)], "stdin": ["-"], "-c": ["-c", text]}[how]
    done = subprocess.run(
        [sys.executable, *command],
        input=text if how == "stdin" else None,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode == 0) == works, done.stderr
    if works:
        assert open_layout(Store.open(tmp_path / "store")).n_places
    else:
        *_, last = done.stderr.splitlines()
        assert "__main__" in last and "workers=1" in last and "memory" not in done.stderr
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(one.info["cmdline"] or [])]


def test_a_worker_that_is_killed_while_it_hands_over_a_large_result(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.sharding.large_results", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.startswith("2 a worker process died"), done.stdout + done.stderr
    assert not [one for one in psutil.process_iter(["cmdline"]) if str(tmp_path) in " ".join(one.info["cmdline"] or [])]


def test_an_error_comes_in_its_turn_and_ends_the_workers() -> None:
    results = in_order(int, ["1", "2", "x", "4"], workers=2)
    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ValueError, match="'x'") as caught:
        next(results)
    assert "In a worker process" in caught.value.__notes__[0]
    assert not multiprocessing.active_children()
