"""The training benchmark on a machine without a GPU: it says so, or shows that it works."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks.train", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_a_tiny_run_makes_its_figure(tmp_path: Path) -> None:
    done = benchmark("--json", str(tmp_path / "train.json"), "--tiny", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "train.json").read_text())
    assert made["figures"]["wait_share"]["wanted"] == "<= 0.03" and made["tiny"]
    repeat = made["repeats"][0]
    assert repeat["steps"] == 24 and repeat["pairs_per_second"] > 0
    assert repeat["wait_share"] == made["figures"]["wait_share"]["value"] >= 0


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = benchmark("--json", str(tmp_path / "train.json"))
    assert done.returncode == 2 and "no GPU here" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "train.json").exists()
