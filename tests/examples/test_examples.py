"""Each example does what its docstring says, on a rendered store; one of them as a person types it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))


def run(name: str, *words: str) -> None:
    """Run an example within this process: importing torch for each would take most of the time."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(*words)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store rendered by the example that renders one, run as a person types it."""
    url = str(tmp_path_factory.mktemp("examples") / "store")
    command = [sys.executable, str(FOLDER / "render_a_store.py"), url]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "320 places" in done.stdout
    return url


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_says_how_to_run_it(name: str) -> None:
    assert f"    python examples/{name}.py" in (FOLDER / f"{name}.py").read_text()


def test_stream_into_your_loop(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("stream_into_your_loop", store)
    said = capsys.readouterr().out
    assert "batch 11 of 11: loss" in said and "hardness of the plan" in said and "requests" in said


def test_stream_with_lightning(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lightning", reason="pip install 'geostream[examples]'")
    run("stream_with_lightning", store)
    said = capsys.readouterr().out
    assert "epoch 2: 11 batches" in said and "trained 22 steps" in said


@pytest.mark.slow  # tests/cli/test_main.py does the same by the command
def test_train_and_evaluate(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("train_and_evaluate", store)
    said = capsys.readouterr().out
    assert "epoch 4: planned by visual neighbours" in said and "R@1" in said
    assert "neighbours/visual-epoch-0002.zarr" in said


def test_mine_for_another_model(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("mine_for_another_model", store)
    said = capsys.readouterr().out
    score = float(said.partition("hardness score ")[2].split()[0])
    assert 0.3 < score < 3
    assert "looks most like" in said


def test_add_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0)
    for place in range(12):
        folder = tmp_path / "raw" / f"place {place}"
        folder.mkdir(parents=True)
        for name in ("tile", "view-1", "view-2"):
            Image.fromarray(noise.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / f"{name}.jpg")
    run("add_a_data_set", str(tmp_path / "raw"), str(tmp_path / "store"))
    said = capsys.readouterr().out
    assert "12 places, 18 pairs to train and 6 to test" in said
    assert "tile (4, 3, 256, 256), view (4, 3, 256, 512)" in said
