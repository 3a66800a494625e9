"""``weights=timm`` on a machine without the hub: what is cached is used, anything else is one line, at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from geostream.errors import BadInput
from geostream.store import Store
from geostream.training.model import Encoder
from geostream.training.weights import begin_with
from tests.command import refused
from tests.helpers import tiny_layout

MODEL = "test_convnext"
NOBODY = "http://127.0.0.1:9"  # the discard port: connections are refused


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    return tmp_path / "hub"


def test_a_hub_that_is_not_reached_is_one_line_at_once(cache: Path) -> None:
    encoder = Encoder(MODEL)
    started = time.monotonic()
    with pytest.raises(BadInput) as caught:
        begin_with(encoder, "timm")
    assert time.monotonic() - started < 10  # the hub's own client retries for 45 seconds
    text = str(caught.value)
    assert all(words in text for words in (MODEL, NOBODY, "--set weights=FILE", "--set weights=scratch"))
    assert not constants.HF_HUB_OFFLINE


def test_what_is_cached_needs_no_hub(cache: Path) -> None:
    tensors = timm.create_model(MODEL).state_dict()
    folder = cache / "models--timm--test_convnext.r160_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(tensors, folder / "snapshots" / ("0" * 40) / "model.safetensors")
    encoder = Encoder(MODEL)
    begin_with(encoder, "timm")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in encoder.network.state_dict().items())


@pytest.mark.slow
def test_the_command_leaves_it_to_the_environment(tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    tiny_layout(Store.open(store))
    words = ["train", store, "--set", f"model={MODEL}", "--set", "weights=timm", "--set", "tile_size=32"]
    assert "HF_HUB_OFFLINE" in refused(*words)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": NOBODY, "NO_PROXY": "127.0.0.1"}
    del environment["HF_HUB_OFFLINE"]
    command = [sys.executable, "-m", "geostream", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("geostream: ") and NOBODY in line
