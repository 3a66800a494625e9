"""Write and restore a run's checkpoints: what is in them, and how it gets into the network and its optimizer.

``model.safetensors`` holds the weights to evaluate with: the EMA if the run keeps one, else the trained weights.
``optimizer.safetensors`` holds the optimizer's state by parameter name, so that it can be read without this code, and
with an EMA the trained weights too. Nothing is pickled. Learning rate, hyper-parameters and random states are not
stored, because they follow from the settings, the position and the number of steps. Where these objects lie, and when
a checkpoint is whole, is in :mod:`geostream.training.checkpoint_files`.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from geostream.errors import StaleArtefact, StoreError
from geostream.store import Store
from geostream.training.checkpoint_files import (
    FOLDER,
    MODEL,
    OPTIMIZER,
    STATE,
    WRITTEN,
    Damaged,
    Position,
    checkpoint_name,
    crc32c_of,
    list_checkpoints,
    position_of,
    read_object,
    read_state,
    written_checkpoints,
)
from geostream.training.model import Encoder
from geostream.training.step import TrainStep

TRAINED = "trained/"  # prefix of the trained weights in the optimizer's file, for a run with an EMA

logger = logging.getLogger(__name__)


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
    begun = written_checkpoints(run)
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
        "objects": {path: {"bytes": len(data), "crc32c": crc32c_of(data)} for path, data in objects.items()},
    }
    folder.write_json(STATE, state)
    return name


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
    state = read_state(run, name)
    position = position_of(run, name, state)
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
    state = read_state(run, name)
    return str(state["model"]), _tensors(run, name, MODEL, state)


def _tensors(run: Store, name: str, path: str, state: dict[str, Any]) -> dict[str, Tensor]:
    """Read the tensors of one object of a checkpoint; raise Damaged if it is not as it was written."""
    try:
        return safetensors.torch.load(read_object(run, name, path, state))
    except SafetensorError as error:
        where = f"{run.url}/{FOLDER}/{name}"
        raise Damaged(f"{where}/{path}: damaged ({error}); delete {where}") from error


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
