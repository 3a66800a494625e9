"""Write, read, restore and remove a run's checkpoints.

A checkpoint is a folder of three objects. ``model.safetensors`` holds the weights to evaluate with: the EMA if the run
keeps one, else the trained weights. ``optimizer.safetensors`` holds the optimizer's state by parameter name, so that it
can be read without this code, and with an EMA the trained weights too. ``state.json`` holds the position in the plan,
and size and checksum of the other two. It is written last: without it there is no checkpoint, and one whose objects do
not match it is damaged. Nothing is pickled. Learning rate, hyper-parameters and random states are not stored, because
they follow from the settings, the position and the number of steps.

``checkpoints/written.json`` names the checkpoints that the run has begun to write. Only these are ever removed, and of
each only its three objects, so a copy that somebody keeps beside them stays.
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
TRAINED = "trained/"  # prefix of the trained weights in the optimizer's file, for a run with an EMA

logger = logging.getLogger(__name__)


class Damaged(StoreError):
    """A checkpoint's objects are not as they were written."""


@dataclass(frozen=True)
class Position:
    """How far a run has come.

    Attributes:
        layout_id: Id of the layout that the run reads.
        places_id: Id of the layout's places, the same in all its generations.
        epoch: The current epoch.
        plan: Hash of its plan.
        cursor: Number of batches of that plan that are trained.
        step: Number of optimizer steps of the whole run.
        finished: Whether the plan is used up.
        outcome: The epoch's outcome so far, if it is not finished.
    """

    layout_id: str
    places_id: str
    epoch: int
    plan: str
    cursor: int
    step: int
    finished: bool
    outcome: dict[str, Any] | None = None


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after ``step`` steps: ``step-00001200``. Names sort in the order of steps."""
    return f"step-{step:08d}"


def save_checkpoint(run: Store, train_step: TrainStep, position: Position) -> str:
    """Write a checkpoint.

    Args:
        run: The run's folder.
        train_step: The encoder and its optimizer.
        position: How far the run has come.

    Returns:
        The checkpoint's name.
    """
    name = checkpoint_name(position.step)
    folder = run.child(FOLDER, name)
    begun = _written(run)
    if name not in begun:
        run.write_json(WRITTEN, sorted({*begun, name}))
    folder.delete(STATE)  # a checkpoint that is being replaced must not look complete
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
    """Remove a checkpoint from the run's folder ``run``; from the first moment on it no longer looks complete."""
    folder = run.child(FOLDER, name)
    folder.delete(STATE)
    folder.delete_all([MODEL, OPTIMIZER])


def prune_checkpoints(run: Store, newest: str, needed: Set[str], keep: int) -> None:
    """Remove the checkpoints that are no longer needed, of those that ``written.json`` names.

    Kept are the ``keep`` newest at the end of an epoch (``newest`` is one of them, whatever its position), those
    ``needed``, and, while an epoch is under way, the last one at the end of an epoch. Incomplete checkpoints are
    removed, and so are those that are later than ``newest``, which a run leaves behind when it goes back to an earlier
    one.

    Args:
        run: The run's folder.
        newest: Name of the checkpoint that the run continues from.
        needed: Names of checkpoints that are still read: to evaluate, to embed with.
        keep: How many to keep.

    Raises:
        BadInput: There is no checkpoint ``newest``.
    """
    names = _written(run)
    whole = []
    for name in names:
        with suppress(GeostreamError):  # not complete
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
    """Return the names in ``written.json``, oldest first; of an older run without it, the complete checkpoints."""
    try:
        names: list[str] = run.read_json(WRITTEN)
    except NotFound:
        return list_checkpoints(run)
    return names


def list_checkpoints(run: Store) -> list[str]:
    """Return the names of the complete checkpoints in the run's folder, oldest first."""
    names = (name for name in run.folders(FOLDER) if NAME.fullmatch(name))
    return [name for name in names if run.exists(f"{FOLDER}/{name}/{STATE}")]


def read_position(run: Store, name: str) -> Position:
    """Read the position stored in a checkpoint.

    Args:
        run: The run's folder.
        name: The checkpoint's name.

    Raises:
        BadInput: There is no such checkpoint.
        StaleArtefact: Another version of geostream wrote it.
        StoreError: It is damaged, or cannot be read.
    """
    return _position(run, name, _state(run, name))


def restore_newest(run: Store, train_step: TrainStep, places_id: str) -> tuple[str, Position] | None:
    """Restore the newest checkpoint that is not damaged; warn of each damaged one that is skipped.

    Args:
        run: The run's folder.
        train_step: The encoder and optimizer to set.
        places_id: Id of the places that the run trains on.

    Returns:
        The checkpoint's name and position; None if the run has no checkpoints.

    Raises:
        StaleArtefact: A checkpoint is of another model or of other places.
        StoreError: All checkpoints are damaged.
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
    """Set the encoder and optimizer of a train step to what a checkpoint holds.

    Args:
        run: The run's folder.
        name: The checkpoint's name.
        train_step: The encoder and optimizer to set.
        places_id: Id of the places that the run trains on.

    Returns:
        The checkpoint's position.

    Raises:
        BadInput: There is no such checkpoint.
        StaleArtefact: It is of another model or of other places.
        Damaged: It is not as it was written.
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
    """Set the encoder's weights to those of a checkpoint's ``model.safetensors``.

    Args:
        run: The run's folder.
        name: The checkpoint's name.
        encoder: The encoder to set.

    Raises:
        BadInput: There is no such checkpoint.
        StaleArtefact: It is of another model.
        Damaged: It is not as it was written.
    """
    trained, tensors = read_weights(run, name)
    if trained != encoder.name:
        raise StaleArtefact(f"{run.url}/{FOLDER}/{name}: holds model {trained}, not {encoder.name}; start another run")
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise StaleArtefact(f"{run.url}/{FOLDER}/{name}: does not fit {encoder.name}: {reason}") from error


def read_weights(run: Store, name: str) -> tuple[str, dict[str, Tensor]]:
    """Read the weights to evaluate with, as :func:`load_weights` sets them.

    Args:
        run: The run's folder.
        name: The checkpoint's name.

    Returns:
        timm's name of the model, and the encoder's tensors by name.

    Raises:
        BadInput: There is no such checkpoint.
        Damaged: It is not as it was written.
    """
    state = _state(run, name)
    return str(state["model"]), _tensors(run, name, MODEL, state)


def weights_checksum(run: Store, name: str) -> int:
    """Return the CRC32C of the weights of a checkpoint; errors are those of :func:`read_position`."""
    return int(_state(run, name)["objects"][MODEL]["crc32c"])


def copy_weights(run: Store, name: str, to: Store) -> int:
    """Copy a checkpoint without its optimizer: what is needed to evaluate, not to train on.

    Args:
        run: The run's folder.
        name: The checkpoint's name.
        to: The folder of another run, or of a model; the copy has the same name there.

    Returns:
        CRC32C of the weights.

    Raises:
        BadInput: There is no such checkpoint.
        Damaged: It is not as it was written.
    """
    state = _state(run, name)
    data = _data(run, name, MODEL, state)
    folder = to.child(FOLDER, name)
    folder.write(MODEL, data)
    folder.write_json(STATE, state | {"objects": {MODEL: state["objects"][MODEL]}})
    return _crc32c(data)


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
    """Read the tensors of one object of a checkpoint; raise Damaged if it is not as it was written."""
    try:
        return safetensors.torch.load(_data(run, name, path, state))
    except SafetensorError as error:
        where = f"{run.url}/{FOLDER}/{name}"
        raise Damaged(f"{where}/{path}: damaged ({error}); delete {where}") from error


def _data(run: Store, name: str, path: str, state: dict[str, Any]) -> bytes:
    """Read one object of a checkpoint; raise Damaged if it is not as it was written."""
    where = f"{run.url}/{FOLDER}/{name}"
    try:
        data = run.read(f"{FOLDER}/{name}/{path}")
        if {"bytes": len(data), "crc32c": _crc32c(data)} != state["objects"][path]:
            raise Damaged(f"{where}/{path}: damaged; delete {where}")
    except NotFound as error:
        raise Damaged(f"{where}/{path}: missing; delete {where}") from error
    except KeyError as error:
        raise Damaged(f"{where}/{path}: damaged ({error}); delete {where}") from error
    return data


def _crc32c(data: bytes) -> int:
    return int(google_crc32c.value(data))


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
