"""Two ranks train as one process does with the whole step: the same losses, and the same weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.rank_worker import CASES, STEPS, train_case


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks, each a process, wrote of all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.rank_worker", str(folder)],
        env={**os.environ, **shared, "OMP_NUM_THREADS": "1"},
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process_with_the_whole_step(name: str, of_two_ranks: Path) -> None:
    losses, weights = train_case(CASES[name])
    first, second = (json.loads((of_two_ranks / f"{name}-{rank}.json").read_text()) for rank in range(2))
    assert first == second, "the ranks tell different losses"
    assert first == pytest.approx(losses, rel=1e-4)
    assert len(set(losses)) == STEPS
    made = [load_file(of_two_ranks / f"{name}-{rank}.safetensors") for rank in range(2)]
    start: dict[str, Any] = train_case(CASES[name], steps=0)[1]
    moved = max(float((weights[key] - start[key]).abs().max()) for key in weights)
    for key, wanted in weights.items():
        assert torch.equal(made[0][key], made[1][key]), "the ranks went apart"
        assert float((made[0][key] - wanted).abs().max()) < 0.02 * moved, key
    if name == "frozen-and-by-layer":
        assert all(torch.equal(made[0][key], start[key]) for key in start if key.startswith("network.stages.0"))
