"""List, read, prune and copy a run's checkpoints as objects on the store, without torch, which takes seconds to import.

A checkpoint is a folder of three objects. ``state.json`` holds the position in the plan, and size and checksum of the
other two, ``model.safetensors`` and ``optimizer.safetensors`` (:mod:`geostream.training.checkpoint` says what is in
them). It is written last: without it there is no checkpoint, and one whose objects do not match it is damaged.

``checkpoints/written.json`` names the checkpoints that the run has begun to write. Only these are ever removed, and of
each only its three objects, so a copy that somebody keeps beside them stays.
"""

from __future__ import annotations

import re
from collections.abc import Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import google_crc32c

from geostream.errors import BadInput, GeostreamError, NotFound, StaleArtefact, StoreError
from geostream.store import Store

FOLDER = "checkpoints"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
WRITTEN = f"{FOLDER}/written.json"
NAME = re.compile(r"step-\d{8,}")


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
    names = written_checkpoints(run)
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


def written_checkpoints(run: Store) -> list[str]:
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
    return position_of(run, name, read_state(run, name))


def weights_checksum(run: Store, name: str) -> int:
    """Return the CRC32C of the weights of a checkpoint; errors are those of :func:`read_position`."""
    return int(read_state(run, name)["objects"][MODEL]["crc32c"])


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
    state = read_state(run, name)
    data = read_object(run, name, MODEL, state)
    folder = to.child(FOLDER, name)
    folder.write(MODEL, data)
    folder.write_json(STATE, state | {"objects": {MODEL: state["objects"][MODEL]}})
    return crc32c_of(data)


def read_state(run: Store, name: str) -> dict[str, Any]:
    """Read a checkpoint's ``state.json``; errors are those of :func:`read_position`."""
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


def position_of(run: Store, name: str, state: dict[str, Any]) -> Position:
    """Return the position in a checkpoint's state; raise StaleArtefact where another version wrote it."""
    try:
        return Position(**state["position"])
    except TypeError as error:
        raise _of_another_version(run, name) from error


def _of_another_version(run: Store, name: str) -> StaleArtefact:
    where = f"{run.url}/{FOLDER}/{name}/{STATE}"
    return StaleArtefact(f"{where}: written by another version of geostream; start another run")


def read_object(run: Store, name: str, path: str, state: dict[str, Any]) -> bytes:
    """Read one object of a checkpoint; raise Damaged if it is not as it was written."""
    where = f"{run.url}/{FOLDER}/{name}"
    try:
        data = run.read(f"{FOLDER}/{name}/{path}")
        if {"bytes": len(data), "crc32c": crc32c_of(data)} != state["objects"][path]:
            raise Damaged(f"{where}/{path}: damaged; delete {where}")
    except NotFound as error:
        raise Damaged(f"{where}/{path}: missing; delete {where}") from error
    except KeyError as error:
        raise Damaged(f"{where}/{path}: damaged ({error}); delete {where}") from error
    return data


def crc32c_of(data: bytes) -> int:
    """Return the checksum of an object as the state has it."""
    return int(google_crc32c.value(data))
