"""Checkpoints: whole or absent, everything comes back, and none of another model or layout is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from geostream.errors import BadInput, StaleArtefact, StoreError
from geostream.store import Store
from geostream.training.checkpoint import (
    Position,
    list_checkpoints,
    load_weights,
    read_position,
    restore,
    save_checkpoint,
)
from geostream.training.model import Encoder
from geostream.training.optimise import make_optimizer
from geostream.training.stages import new_encoder
from tests.training.settings import TINY

POSITION = Position("layout", "places", epoch=3, plan="hash", cursor=10, step=30, finished=True)
VIEWS = torch.rand(4, 3, 32, 64, generator=torch.Generator().manual_seed(0))


def some_steps(encoder: Encoder, optimizer: AdamW, steps: int = 2) -> None:
    for _ in range(steps):
        noisy = VIEWS + 0.1 * torch.rand(VIEWS.shape)  # from torch's generator
        queries, references = encoder(noisy, VIEWS[..., :32])
        optimizer.zero_grad()
        (-(queries * references).sum() * encoder.logit_scale).backward()
        optimizer.step()


def trained(seed: int = 0) -> tuple[Encoder, AdamW]:
    encoder = new_encoder(TINY.model_copy(update={"seed": seed}))
    optimizer = make_optimizer(encoder, TINY)
    some_steps(encoder, optimizer)
    return encoder, optimizer


def weights(encoder: Encoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in encoder.state_dict().items()}


def test_training_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    run = Store.open(tmp_path)
    encoder, optimizer = trained()
    assert save_checkpoint(run, encoder, optimizer, POSITION) == "step-00000030"
    some_steps(encoder, optimizer)
    other, other_optimizer = trained(seed=9)
    assert restore(run, "step-00000030", other, other_optimizer, "places") == POSITION
    some_steps(other, other_optimizer)
    expected, found = weights(encoder), weights(other)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_only_safe_formats_are_written(tmp_path: Path) -> None:
    save_checkpoint(Store.open(tmp_path), *trained(), POSITION)
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["model.safetensors", "optimizer.safetensors", "state.json"]
    assert read_position(Store.open(tmp_path), "step-00000030") == POSITION


def test_a_half_written_checkpoint_does_not_exist(tmp_path: Path) -> None:
    run = Store.open(tmp_path)
    encoder, optimizer = trained()
    save_checkpoint(run, encoder, optimizer, POSITION)
    run.write("checkpoints/step-00000040/model.safetensors", b"half")
    assert list_checkpoints(run) == ["step-00000030"]
    with pytest.raises(BadInput, match=r"no checkpoint step-00000040 \(there: step-00000030\)"):
        restore(run, "step-00000040", encoder, optimizer, "places")


def test_damage_is_told(tmp_path: Path) -> None:
    run = Store.open(tmp_path)
    encoder, optimizer = trained()
    save_checkpoint(run, encoder, optimizer, POSITION)
    path = "checkpoints/step-00000030/model.safetensors"
    run.write(path, run.read(path)[:1000])
    with pytest.raises(StoreError, match=r"model.safetensors: damaged"):
        restore(run, "step-00000030", encoder, optimizer, "places")


def test_another_layout_or_model_is_refused(tmp_path: Path) -> None:
    run = Store.open(tmp_path)
    encoder, optimizer = trained()
    save_checkpoint(run, encoder, optimizer, POSITION)
    with pytest.raises(StaleArtefact, match=r"made on places places, not on other"):
        restore(run, "step-00000030", encoder, optimizer, "other")
    with pytest.raises(StaleArtefact, match=r"holds model test_convnext, not test_convnext2"):
        load_weights(run, "step-00000030", Encoder("test_convnext2"))


def test_a_position_of_another_version_is_told(tmp_path: Path) -> None:
    run = Store.open(tmp_path)
    encoder, optimizer = trained()
    name = save_checkpoint(run, encoder, optimizer, POSITION)
    state = run.read_json(f"checkpoints/{name}/state.json")
    del state["position"]["places_id"]
    run.write_json(f"checkpoints/{name}/state.json", state)
    with pytest.raises(StaleArtefact, match="written by another version of geostream; start another run"):
        restore(run, name, encoder, optimizer, "places")
