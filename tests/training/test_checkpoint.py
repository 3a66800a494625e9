"""Checkpoints: whole or absent, everything comes back, and none of another model or layout is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from geostream.errors import BadInput, StaleArtefact
from geostream.runs.stages import new_encoder
from geostream.store import Store
from geostream.training.checkpoint import load_weights, restore, restore_newest, save_checkpoint
from geostream.training.checkpoint_files import (
    FOLDER,
    WRITTEN,
    Damaged,
    Position,
    list_checkpoints,
    prune_checkpoints,
    read_position,
)
from geostream.training.distributed import ProcessGroup
from geostream.training.model import Encoder
from geostream.training.step import TrainStep
from tests.training.settings import TINY

SETTINGS = TINY.changed(color_jitter=0.0, model_options={"drop_path_rate": 0.3})
POSITION = Position("layout", "places", epoch=3, plan="hash", cursor=10, step=30, finished=True)
NAME = "step-00000030"


def some_steps(train_step: TrainStep, steps: int = 2) -> None:
    for _ in range(steps):
        random = torch.Generator().manual_seed(train_step.steps)
        images = {
            kind: torch.randint(0, 256, (4, 3, 32, width), dtype=torch.uint8, generator=random)
            for kind, width in (("view", 64), ("tile", 32))
        }
        train_step.step([{**images, "pair": torch.arange(4)}], 1e-3)


def trained(seed: int = 0, **settings: object) -> TrainStep:
    made = SETTINGS.changed(seed=seed, **settings)
    train_step = TrainStep(new_encoder(made), made, ProcessGroup())
    some_steps(train_step)
    return train_step


def weights(train_step: TrainStep) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in train_step.encoder.state_dict().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("more", [{"ema_decay": 0.0}, {"ema_decay": 0.9}, {"ema_decay": 0.9, "birds_eye": 9.0}])
def test_training_goes_on_as_if_it_had_never_stopped(tmp_path: Path, more: dict[str, Any]) -> None:
    run = Store.open(tmp_path)
    train_step = trained(**more)
    assert save_checkpoint(run, train_step, POSITION) == NAME
    to_use = {name: tensor.clone() for name, tensor in train_step.ema_encoder.state_dict().items()}
    fresh = new_encoder(SETTINGS)
    load_weights(run, NAME, fresh)
    assert_equal(dict(fresh.state_dict()), to_use)
    some_steps(train_step)
    other = TrainStep(new_encoder(train_step.settings.changed(seed=9)), train_step.settings, ProcessGroup())
    assert restore(run, NAME, other, "places") == POSITION
    some_steps(other)
    assert_equal(weights(train_step), weights(other))
    assert_equal(train_step.tensors(), other.tensors())


def test_only_safe_formats_are_written(tmp_path: Path) -> None:
    save_checkpoint(Store.open(tmp_path), trained(), POSITION)
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert names == ["model.safetensors", "optimizer.safetensors", "state.json", "written.json"]
    assert read_position(Store.open(tmp_path), NAME) == POSITION


def test_a_half_written_checkpoint_does_not_exist(tmp_path: Path) -> None:
    run = Store.open(tmp_path)
    train_step = trained()
    assert restore_newest(run, train_step, "places") is None
    save_checkpoint(run, train_step, POSITION)
    run.write("checkpoints/step-00000040/model.safetensors", b"half")
    assert list_checkpoints(run) == [NAME]
    assert restore_newest(run, train_step, "places") == (NAME, POSITION)
    with pytest.raises(BadInput, match="step-00000040 .*step-00000030"):
        restore(run, "step-00000040", train_step, "places")


@pytest.mark.parametrize("path", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["shorter", "one bit", "gone"])
def test_damage_is_told_and_changes_nothing(tmp_path: Path, path: str, damage: str) -> None:
    run = Store.open(tmp_path)
    train_step = trained()
    save_checkpoint(run, train_step, POSITION)
    some_steps(train_step)
    before = weights(train_step)
    where = f"{FOLDER}/{NAME}/{path}"
    data = bytearray(run.read(where))
    data[-1] ^= 1
    run.write(where, bytes(data[:-1] if damage == "shorter" else data))
    if damage == "gone":
        run.delete(where)
    with pytest.raises(Damaged, match=rf"{path}: (damaged|missing); .*{run.url}/{FOLDER}/{NAME}"):
        restore(run, NAME, train_step, "places")
    assert_equal(weights(train_step), before)


def test_another_layout_or_model_is_refused(tmp_path: Path) -> None:
    run = Store.open(tmp_path)
    train_step = trained()
    save_checkpoint(run, train_step, POSITION)
    with pytest.raises(StaleArtefact, match="places places, .*other"):
        restore(run, NAME, train_step, "other")
    with pytest.raises(StaleArtefact, match="test_convnext, .*test_convnext2"):
        load_weights(run, NAME, Encoder("test_convnext2"))


@pytest.mark.parametrize("lacks", ["position", "objects", "places_id"])
def test_a_state_of_another_version_is_told(tmp_path: Path, lacks: str) -> None:
    run = Store.open(tmp_path)
    train_step = trained()
    name = save_checkpoint(run, train_step, POSITION)
    state = run.read_json(f"checkpoints/{name}/state.json")
    del (state["position"] if lacks == "places_id" else state)[lacks]
    run.write_json(f"checkpoints/{name}/state.json", state)
    with pytest.raises(StaleArtefact, match=f"{name}.* version"):
        restore(run, name, train_step, "places")


def put(run: Store, step: int, finished: bool) -> None:
    """The state of a checkpoint, without its tensors."""
    position = {**POSITION.__dict__, "step": step, "finished": finished}
    run.write_json(f"{FOLDER}/step-{step:08d}/state.json", {"model": "m", "position": position, "objects": {}})


@pytest.mark.parametrize(
    ("newest", "best", "keep", "kept"),
    [
        (35, None, 1, [30, 35]),
        (35, 10, 1, [10, 30, 35]),
        (35, 10, 3, [10, 20, 30, 35]),
        (35, 10, 9, [10, 20, 30, 35]),
        (30, 10, 2, [10, 20, 30]),
        (30, 30, 1, [30]),
    ],
)
def test_what_is_kept(tmp_path: Path, newest: int, best: int | None, keep: int, kept: list[int]) -> None:
    """Ends of epochs, the newest, and the best: nothing within epochs, nothing half written, nothing abandoned."""
    run = Store.open(tmp_path)
    for step in (5, 10, 20, 25, 30, 35):
        put(run, step, step % 10 == 0)
    run.write(f"{FOLDER}/step-00000028/model.safetensors", b"half")
    run.write(f"{FOLDER}/step-00000040/state.json", b"{")
    begun = [f"step-{step:08d}" for step in (5, 10, 20, 25, 28, 30, 35, 40)]
    run.write_json(WRITTEN, begun)
    theirs = {"step-00000010-copy/state.json", "step-00000007/model.safetensors", "step-00000025/notes.txt"}
    for path in theirs:
        run.write(f"{FOLDER}/{path}", b"{}")
    prune_checkpoints(run, f"step-{newest:08d}", set() if best is None else {f"step-{best:08d}"}, keep)
    left = {info.path.removeprefix(f"{FOLDER}/") for info in run.list(FOLDER)} - {"written.json"}
    assert left == theirs | {f"step-{step:08d}/state.json" for step in kept}
    assert run.read_json(WRITTEN) == [f"step-{step:08d}" for step in kept]
    assert list_checkpoints(run) == [f"step-{step:08d}" for step in kept]


def test_an_older_run_has_not_written_its_checkpoints_down(tmp_path: Path) -> None:
    run = Store.open(tmp_path)
    for step in (10, 20, 30):
        put(run, step, True)
    run.write(f"{FOLDER}/mine/state.json", b"{}")
    prune_checkpoints(run, "step-00000030", set(), 1)
    assert run.folders(FOLDER) == ["mine", "step-00000030"]
