"""The exported encoder gives the vectors of torch, in programs that know nothing of geostream."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from geostream.errors import BadInput
from geostream.store import Store
from geostream.training import export as module
from geostream.training.export import FILES, export_encoder, first_images
from geostream.training.model import Encoder
from tests.helpers import tiny_layout
from tests.training.settings import TINY

pytest.importorskip("onnxruntime")


@pytest.mark.slow  # torch's exporter takes seconds
def test_others_can_embed_with_what_is_exported(tmp_path: Path) -> None:
    import onnxruntime

    images = first_images(tiny_layout(Store.open(tmp_path / "store")), TINY, 3)
    assert images["tile"].shape == (3, 3, 32, 32) and images["view"].shape == (3, 3, 32, 64)
    torch.manual_seed(5)
    encoder, folder = Encoder.of(TINY).eval(), tmp_path / "made" / "model"
    found = export_encoder(encoder, TINY, folder, {"run": "run"}, images)
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    config = json.loads((folder / "config.json").read_text())
    assert config["onnx_difference"] == found and max(found.values()) < 1e-5 and config["source"] == {"run": "run"}
    assert config["input"]["birds_eye"] is None
    with torch.inference_mode():
        wanted = {kind: encoder.encode(of_kind).numpy() for kind, of_kind in images.items()}
    for kind, of_kind in images.items():  # by ONNX alone, one at a time
        session = onnxruntime.InferenceSession(str(folder / f"{kind}.onnx"))
        for number in range(3):
            [vector] = session.run(None, {"images": of_kind[number : number + 1].numpy()})
            assert np.allclose(vector[0], wanted[kind][number], atol=1e-5)
    network = timm.create_model(config["model"], num_classes=0, **config["options"]).eval()  # by timm alone
    network.load_state_dict(load_file(folder / "model.safetensors"))
    mean, std = (torch.tensor(config["input"][name]).reshape(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        vectors = normalize(network((images["view"].float() / 255 - mean) / std), dim=1)
    assert np.allclose(vectors.numpy(), wanted["view"], atol=1e-6) and vectors.shape[1] == config["dim"]


@pytest.mark.slow  # torch's exporter takes seconds
def test_a_view_is_also_seen_from_above_where_it_is_in_training(tmp_path: Path) -> None:
    import onnxruntime

    settings = TINY.changed(birds_eye=20.0, camera_height=2.0, vertical_degrees=180)
    torch.manual_seed(5)
    encoder = Encoder.of(settings).eval()
    images = first_images(tiny_layout(Store.open(tmp_path / "store")), settings, 3)
    found = export_encoder(encoder, settings, tmp_path / "model", {}, images)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert max(found.values()) < 1e-5
    assert config["input"]["birds_eye"] == {"metres": 20.0, "camera_height": 2.0, "vertical_degrees": 180.0}
    session = onnxruntime.InferenceSession(str(tmp_path / "model" / "view.onnx"))
    [vectors] = session.run(None, {"images": images["view"].numpy()})
    with torch.inference_mode():
        assert np.allclose(vectors, encoder.encode_views(images["view"]).numpy(), atol=1e-5)
        assert not np.allclose(vectors, encoder.encode(images["view"]).numpy(), atol=1e-3)


@pytest.mark.slow  # torch's exporter takes seconds
def test_a_file_that_differs_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    none = {kind: torch.zeros(0, 3, 32, 32, dtype=torch.uint8) for kind in module.KINDS}
    with pytest.raises(BadInput, match=r"tile.onnx differs from torch"):
        export_encoder(Encoder.of(TINY), TINY, tmp_path / "model", {}, none)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("mine")
    with pytest.raises(BadInput, match=r"config.json: is there already"):
        export_encoder(Encoder.of(TINY), TINY, tmp_path, {}, {})
    with pytest.raises(BadInput, match="a file"):
        export_encoder(Encoder.of(TINY), TINY, tmp_path / "config.json", {}, {})
    assert (tmp_path / "config.json").read_text() == "mine"
