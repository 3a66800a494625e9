"""Checkpoints: three objects in a folder of the run, of which ``state.json`` is written last and means *whole*.

Decides that a checkpoint is tensors (safetensors) and JSON, never a pickle, and that the optimizer's state is stored
by parameter name, so that it can be read without this code. Learning rate and hyper-parameters are not stored here:
they follow from the settings and the position. A folder without ``state.json`` does not exist for a reader.
"""

from __future__ import annotations

import base64
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer

from geostream.errors import BadInput, NotFound, StaleArtefact, StoreError
from geostream.store import Store
from geostream.training.model import Encoder

FOLDER = "checkpoints"


@dataclass(frozen=True)
class Position:
    """Where a run stands: ``step`` batches trained in all, ``cursor`` of them on the plan of ``epoch``."""

    layout_id: str
    places_id: str  # of the layout; the same in all its generations
    epoch: int
    plan: str  # hash of the plan
    cursor: int
    step: int
    finished: bool  # the plan of ``epoch`` is used up
    outcome: dict[str, Any] | None = None  # of the epoch so far, where it is not


def save_checkpoint(run: Store, encoder: Encoder, optimizer: Optimizer, position: Position) -> str:
    """Write a checkpoint of the run and return its name, ``step-00001200``."""
    name = f"step-{position.step:08d}"
    folder = run.child(FOLDER, name)
    folder.delete("state.json")  # nothing may look whole while it is being replaced
    folder.write("model.safetensors", safetensors.torch.save(_on_cpu(encoder.state_dict())))
    folder.write("optimizer.safetensors", safetensors.torch.save(_on_cpu(_optimizer_tensors(encoder, optimizer))))
    state = {"model": encoder.name, "position": asdict(position), "random": _random_states()}
    folder.write_json("state.json", state)
    return name


def drop_checkpoint(run: Store, name: str) -> None:
    """Remove a checkpoint; while that lasts, it does not look whole."""
    run.delete(f"{FOLDER}/{name}/state.json")
    run.delete_prefix(f"{FOLDER}/{name}")


def drop_leftovers(run: Store, newest: str) -> None:
    """Remove what a kill left: all but ``newest`` that is not whole, or not at the end of an epoch."""
    whole = set(list_checkpoints(run))
    for name in run.folders(FOLDER):
        if name != newest and not (name in whole and read_position(run, name).finished):
            drop_checkpoint(run, name)


def list_checkpoints(run: Store) -> list[str]:
    """Names of the whole checkpoints of a run, oldest first."""
    return [name for name in run.folders(FOLDER) if run.exists(f"{FOLDER}/{name}/state.json")]


def read_position(run: Store, name: str) -> Position:
    """The position stored with a checkpoint."""
    return _position(run, name, _state(run, name))


def restore(run: Store, name: str, encoder: Encoder, optimizer: Optimizer, places_id: str) -> Position:
    """Set encoder, optimizer and torch's random states to the checkpoint's; return its position.

    Raises StaleArtefact for a checkpoint of another model, or of other places than the layout's.
    """
    state = _state(run, name)
    position = _position(run, name, state)
    if position.places_id != places_id:
        raise StaleArtefact(
            f"{run.url}/{FOLDER}/{name}: made on places {position.places_id[:12]}, not on {places_id[:12]}; "
            "start another run"
        )
    load_weights(run, name, encoder)
    tensors = _tensors(run, f"{FOLDER}/{name}/optimizer.safetensors")
    names = [parameter for parameter, _ in encoder.named_parameters()]
    slots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        parameter, field = key.rsplit("/", 1)
        slots.setdefault(names.index(parameter), {})[field] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    for device, text in state["random"].items():
        random = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(random)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(random, device)
    return position


def load_weights(run: Store, name: str, encoder: Encoder) -> None:
    """Set the encoder's weights to the checkpoint's. Raises StaleArtefact for another model."""
    trained = _state(run, name)["model"]
    if trained != encoder.name:
        raise StaleArtefact(f"{run.url}/{FOLDER}/{name}: holds model {trained}, not {encoder.name}; start another run")
    try:
        encoder.load_state_dict(_tensors(run, f"{FOLDER}/{name}/model.safetensors"))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise StaleArtefact(f"{run.url}/{FOLDER}/{name}: does not fit {encoder.name}: {reason}") from error


def _state(run: Store, name: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = run.read_json(f"{FOLDER}/{name}/state.json")
    except NotFound as error:
        have = ", ".join(list_checkpoints(run)) or "none"
        raise BadInput(f"{run.url}: no checkpoint {name} (there: {have})") from error
    return state


def _position(run: Store, name: str, state: dict[str, Any]) -> Position:
    try:
        return Position(**state["position"])
    except TypeError as error:
        where = f"{run.url}/{FOLDER}/{name}/state.json"
        raise StaleArtefact(f"{where}: written by another version of geostream; start another run") from error


def _tensors(run: Store, path: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(run.read(path))
    except SafetensorError as error:
        raise StoreError(f"{run.url}/{path}: damaged ({error}); delete this checkpoint's folder") from error


def _optimizer_tensors(encoder: Encoder, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``<parameter>/<field>``; the optimizer holds the encoder's parameters in order."""
    names = [name for name, _ in encoder.named_parameters()]
    slots = optimizer.state_dict()["state"]
    return {f"{names[i]}/{field}": tensor for i, slot in slots.items() for field, tensor in slot.items()}


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _random_states() -> dict[str, str]:
    """torch's generators by device, base64."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}
