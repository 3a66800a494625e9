"""A run begins from a model, from another run, or from a file on a store; resumed, it keeps what it was begun with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from geostream.errors import BadInput
from geostream.layout import Layout
from geostream.runs.first_weights import resolve_weights, set_first_weights
from geostream.runs.loop import train
from geostream.runs.models import promote
from geostream.runs.run import Run
from geostream.runs.stages import load_trained, new_encoder
from geostream.store import Store
from geostream.training.checkpoint_files import drop_checkpoint
from tests.helpers import tiny_layout
from tests.runs.small_runs import run_with_checkpoint
from tests.training.settings import TINY

NAME = "step-00000030"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path)


@pytest.fixture
def layout(store: Store) -> Layout:
    return tiny_layout(store, places=8)


def set_and_compare(run: Run, weights: str, source: Run) -> None:
    """Weights and temperature are those of the source's checkpoint."""
    settings = TINY.changed(seed=9, weights=weights, initial_temperature=0.5)
    encoder = new_encoder(settings)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    set_first_weights(run, encoder, settings.model)
    wanted = load_trained(source, NAME).encoder.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in encoder.state_dict().items())
    assert not torch.equal(before["network.stem.0.weight"], wanted["network.stem.0.weight"])
    assert before["logit_scale"] != wanted["logit_scale"]


def test_what_is_asked_for_becomes_definite(store: Store, layout: Layout) -> None:
    source, _ = run_with_checkpoint(store, layout, "first", seed=3)
    promote(source, NAME, {"r1": 0.5}, over=None, by="run")
    run = Run(store, layout, "next")
    for asked, definite in (
        ("model:current", "model:1"),
        ("model:0001", "model:1"),
        ("run:first", f"run:first/{NAME}"),
        (f"run:first/{NAME}", f"run:first/{NAME}"),
        ("scratch", "scratch"),
        ("timm", "timm"),
        ("s3://bucket/file.pth", "s3://bucket/file.pth"),
    ):
        assert resolve_weights(run, asked) == definite
    for definite in ("model:1", f"run:first/{NAME}"):
        set_and_compare(run, definite, source)
    copy = Run(store, layout, "copy")
    copy.folder = store.child("tiny", "models", "0001")
    drop_checkpoint(source.folder, NAME)
    set_and_compare(run, "model:1", copy)


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ("model:current", "no model was promoted"),
        ("model:7", r"no model 7 \(there: none\)"),
        ("model:best", "model best"),
        ("run:nobody", "runs/nobody"),
        ("run:first/step-00000099", f"step-00000099 .*{NAME}"),
        ("run:../first", "run name"),
        ("run:", "run name"),
    ],
)
def test_what_is_not_there_is_refused(store: Store, layout: Layout, weights: str, named: str) -> None:
    run_with_checkpoint(store, layout, "first")
    with pytest.raises(BadInput, match=named) as caught:
        resolve_weights(Run(store, layout, "next"), weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "test_convnext2"}, "test_convnext → test_convnext2"),
        ({"model_options": {"act_layer": "relu"}}, "act_layer None → relu"),
    ],
)
def test_another_architecture_is_refused(store: Store, layout: Layout, changes: dict[str, object], named: str) -> None:
    run_with_checkpoint(store, layout, "first")
    settings = TINY.changed(weights=f"run:first/{NAME}", **changes)
    with pytest.raises(BadInput, match=named):
        set_first_weights(Run(store, layout, "next"), new_encoder(settings), settings.model)


def test_dropout_may_differ(store: Store, layout: Layout) -> None:
    source, _ = run_with_checkpoint(store, layout, "first", seed=3)
    settings = TINY.changed(weights=f"run:first/{NAME}", model_options={"drop_path_rate": 0.2})
    encoder = new_encoder(settings)
    set_first_weights(Run(store, layout, "next"), encoder, settings.model)
    wanted = load_trained(source, NAME).encoder.state_dict()["network.stem.0.weight"]
    assert torch.equal(encoder.state_dict()["network.stem.0.weight"], wanted)


def test_a_resumed_run_keeps_its_model(store: Store, layout: Layout) -> None:
    """The current model changes while the run is away, and the run's own first checkpoint is already there."""
    for number, name in enumerate(("first", "second")):
        source, _ = run_with_checkpoint(store, layout, name, seed=number)
        promote(source, NAME, {"r1": 0.5}, over=number or None, by="run")
        if not number:
            settings = TINY.changed(epochs=1, first_mining=9, weights="model:current", recluster_below=0.0)
            train(store, layout, "next", settings)
    run = Run(store, layout, "next")
    assert run.settings.model.weights == "model:1"
    assert train(store, layout, "next", settings).already_finished
    with pytest.raises(BadInput, match="weights model:1 → model:2"):
        train(store, layout, "next", settings.changed(weights="model:2"))
