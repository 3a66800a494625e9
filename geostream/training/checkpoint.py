"""Checkpoints: three objects in a folder of the run, of which ``state.json`` is written last and means *whole*.

Decides that a checkpoint is tensors (safetensors) and JSON, never a pickle, and that the optimizer's state is stored
by parameter name, so that it can be read without this code. ``model.safetensors`` holds the weights to use: the
averaged ones where a run averages them, and then those being trained are with the optimizer's. Learning rate,
hyper-parameters and random states are not stored here: they follow from the settings, the position, and the count of
steps. A folder without ``state.json`` does not exist for a reader, and one whose objects are not those that
``state.json`` counted and summed up is damaged. ``written.json`` names the checkpoints that the run has begun: only
these are ever removed, and of these only the three objects, so a copy that somebody keeps beside them stays.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Set
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import google_crc32c
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from geostream.errors import BadInput, GeostreamError, NotFound, StaleArtefact, StoreError
from geostream.store import Store
from geostream.training.model import Encoder
from geostream.training.step import TrainStep

FOLDER = "checkpoints"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
WRITTEN = f"{FOLDER}/written.json"
NAME = re.compile(r"step-\d{8,}")
TRAINED = "trained/"  # prefix of the weights being trained, where those to use are averages

logger = logging.getLogger(__name__)


class Damaged(StoreError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True)
class Position:
    """Where a run stands: after ``step`` steps in all, ``cursor`` batches into the plan of ``epoch``."""

    layout_id: str
    places_id: str  # of the layout; the same in all its generations
    epoch: int
    plan: str  # hash of the plan
    cursor: int
    step: int
    finished: bool  # the plan of ``epoch`` is used up
    outcome: dict[str, Any] | None = None  # of the epoch so far, where it is not


def checkpoint_name(step: int) -> str:
    """Of the checkpoint after so many steps: ``step-00001200``. Names sort as their steps do."""
    return f"step-{step:08d}"


def save_checkpoint(run: Store, train_step: TrainStep, position: Position) -> str:
    """Write a checkpoint of the run and return its name."""
    name = checkpoint_name(position.step)
    folder = run.child(FOLDER, name)
    begun = _written(run)
    if name not in begun:
        run.write_json(WRITTEN, sorted({*begun, name}))
    folder.delete(STATE)  # nothing may look whole while it is being replaced
    tensors = train_step.tensors()
    objects = {MODEL: safetensors.torch.save(_on_cpu(train_step.ema_encoder.state_dict()))}
    if any(key.startswith("ema/") for key in tensors):
        tensors |= {f"{TRAINED}{key}": tensor for key, tensor in train_step.encoder.state_dict().items()}
    objects[OPTIMIZER] = safetensors.torch.save(_on_cpu(tensors))
    for path, data in objects.items():
        folder.write(path, data)
    state = {
        "model": train_step.encoder.name,
        "position": asdict(position),
        "objects": {path: {"bytes": len(data), "crc32c": _crc32c(data)} for path, data in objects.items()},
    }
    folder.write_json(STATE, state)
    return name


def drop_checkpoint(run: Store, name: str) -> None:
    """Remove a checkpoint; while that lasts, it does not look whole."""
    folder = run.child(FOLDER, name)
    folder.delete(STATE)
    folder.delete_all([MODEL, OPTIMIZER])


def prune_checkpoints(run: Store, newest: str, needed: Set[str], keep: int) -> None:
    """Remove all checkpoints but the ``keep`` newest, the newest of a whole epoch, and those ``needed``.

    Within an epoch only ``newest`` counts. What a kill left half written, and what came after ``newest`` before a run
    went back to it, goes too. Only checkpoints that the run has written down as its own are looked at.
    """
    names = _written(run)
    whole = []
    for name in names:
        with suppress(GeostreamError):  # not whole
            if name < newest and read_position(run, name).finished:
                whole.append(name)
    last = read_position(run, newest)
    kept = {newest, *needed, *[*whole, newest][-keep:], *([] if last.finished else whole[-1:])}
    for name in names:
        if name not in kept:
            drop_checkpoint(run, name)
    if (left := [name for name in names if name in kept]) != names:
        run.write_json(WRITTEN, left)


def _written(run: Store) -> list[str]:
    """Names of the checkpoints that the run has begun, oldest first; of an older run, those that are whole."""
    try:
        names: list[str] = run.read_json(WRITTEN)
    except NotFound:
        return list_checkpoints(run)
    return names


def list_checkpoints(run: Store) -> list[str]:
    """Names of the whole checkpoints of a run, oldest first."""
    names = (name for name in run.folders(FOLDER) if NAME.fullmatch(name))
    return [name for name in names if run.exists(f"{FOLDER}/{name}/{STATE}")]


def read_position(run: Store, name: str) -> Position:
    """The position stored with a checkpoint."""
    return _position(run, name, _state(run, name))


def restore_newest(run: Store, train_step: TrainStep, places_id: str) -> tuple[str, Position] | None:
    """:func:`restore` from the newest checkpoint that is whole, its name and position; None where there is none.

    A damaged one is passed over and told in the log. Raises StoreError where all are damaged.
    """
    names = list_checkpoints(run)
    for name in reversed(names):
        try:
            return name, restore(run, name, train_step, places_id)
        except Damaged as error:
            logger.warning("%s; looking for an older checkpoint", error)
    if names:
        raise StoreError(f"{run.url}: all of its checkpoints are damaged; start another run")
    return None


def restore(run: Store, name: str, train_step: TrainStep, places_id: str) -> Position:
    """Set the train step to what the checkpoint holds; return its position.

    Raises StaleArtefact for a checkpoint of another model, or of other places than the layout's, Damaged for one that
    is not as it was written.
    """
    state = _state(run, name)
    position = _position(run, name, state)
    if position.places_id != places_id:
        raise StaleArtefact(
            f"{run.url}/{FOLDER}/{name}: made on places {position.places_id[:12]}, not on {places_id[:12]}; "
            "start another run"
        )
    tensors = _tensors(run, name, OPTIMIZER, state)
    trained = {key.removeprefix(TRAINED): tensors.pop(key) for key in [*tensors] if key.startswith(TRAINED)}
    load_weights(run, name, train_step.encoder)
    if trained:
        train_step.encoder.load_state_dict(trained)
    train_step.load_tensors(tensors)
    return position


def load_weights(run: Store, name: str, encoder: Encoder) -> None:
    """Set the encoder's weights to those to use of the checkpoint. Raises StaleArtefact for another model, Damaged."""
    state = _state(run, name)
    trained = state["model"]
    if trained != encoder.name:
        raise StaleArtefact(f"{run.url}/{FOLDER}/{name}: holds model {trained}, not {encoder.name}; start another run")
    try:
        encoder.load_state_dict(_tensors(run, name, MODEL, state))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise StaleArtefact(f"{run.url}/{FOLDER}/{name}: does not fit {encoder.name}: {reason}") from error


def _state(run: Store, name: str) -> dict[str, Any]:
    try:
        state = run.read_json(f"{FOLDER}/{name}/{STATE}")
    except NotFound as error:
        have = ", ".join(list_checkpoints(run)) or "none"
        raise BadInput(f"{run.url}: no checkpoint {name} (there: {have})") from error
    except StoreError as error:
        if isinstance(error.__cause__, ValueError):
            raise Damaged(str(error)) from error
        raise
    if not isinstance(state, dict) or not {"model", "position", "objects"} <= state.keys():
        raise _of_another_version(run, name)
    return state


def _position(run: Store, name: str, state: dict[str, Any]) -> Position:
    try:
        return Position(**state["position"])
    except TypeError as error:
        raise _of_another_version(run, name) from error


def _of_another_version(run: Store, name: str) -> StaleArtefact:
    where = f"{run.url}/{FOLDER}/{name}/{STATE}"
    return StaleArtefact(f"{where}: written by another version of geostream; start another run")


def _tensors(run: Store, name: str, path: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """Of one object of the checkpoint, which is as it was written."""
    where = f"{run.url}/{FOLDER}/{name}"
    try:
        data = run.read(f"{FOLDER}/{name}/{path}")
        if {"bytes": len(data), "crc32c": _crc32c(data)} != state["objects"][path]:
            raise Damaged(f"{where}/{path}: damaged; delete {where}")
        return safetensors.torch.load(data)
    except NotFound as error:
        raise Damaged(f"{where}/{path}: missing; delete {where}") from error
    except (SafetensorError, KeyError) as error:
        raise Damaged(f"{where}/{path}: damaged ({error}); delete {where}") from error


def _crc32c(data: bytes) -> int:
    return int(google_crc32c.value(data))


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
