"""Keep the models of a data set: which checkpoints were promoted, which one is current, and which one was before.

A model is a promoted checkpoint of a run. In ``<store>/<dataset>/models/`` lie, for each of them,

- ``0001.json``: the entry, written once. It says which run and checkpoint the model is, what it was measured on, with
  which result, and what it was compared with.
- ``0001/``: a copy of what evaluating needs, namely the run's settings and the encoder's weights. It has the form of a
  run's folder, so that everything that opens a run opens a model too. The copy costs one encoder on the store. Without
  it a model would be lost when its run prunes its checkpoints, or is removed itself.

``current.json`` names the current model, repeats its entry, and holds the history of promotions and rollbacks. It is
replaced conditionally: of two promotions at once one succeeds, and the other is told.

**Killed anywhere.** The folder is claimed with its settings, then the weights are copied, then the entry is written,
and ``current.json`` last. A promotion that was killed leaves at most a number without an entry, or an entry that was
never current. Promoting the same checkpoint again finds that entry and goes on from it. Numbers may therefore have
gaps. Nothing is ever removed.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import geostream
from geostream.errors import AlreadyExists, BadInput, Changed, NotFound, StoreError
from geostream.layout import Layout
from geostream.runs.run import SETTINGS, Run
from geostream.store import Store, check_name
from geostream.training.checkpoint_files import copy_weights, read_position, weights_checksum

CURRENT = "current"
CURRENT_FILE = "current.json"
FORMAT = 1
NUMBER = re.compile(r"[0-9]{4,}")
PROMOTED, ROLLED_BACK = "promoted", "rolled back"

By = Literal["run", "by hand"]
Event = dict[str, Any]  # "number", "what" (PROMOTED or ROLLED_BACK), "at", "by" and "compared" (as of a model)


@dataclass(frozen=True)
class Model:
    """A promoted checkpoint.

    Attributes:
        number: Number of the model in its data set, from 1.
        run: Name of the run.
        checkpoint: Name of the checkpoint within it.
        epoch: The epoch that the checkpoint belongs to.
        layout: ``name`` and ``id`` of the layout that the metrics were measured on.
        gallery: Id of the test gallery they were measured on; None on a layout that names none.
        metrics: As an evaluation gives them.
        code: ``version`` of geostream, and the git ``commit`` where it ran from a checkout, else None.
        compared: What it was compared with when it was first promoted, and the result; None if with nothing.
        promoted: When, in UTC (ISO 8601).
        by: "run", or "by hand".
        crc32c: Checksum of the weights.
    """

    number: int
    run: str
    checkpoint: str
    epoch: int
    layout: dict[str, str]
    gallery: str | None
    metrics: dict[str, Any]
    code: dict[str, str | None]
    compared: dict[str, Any] | None
    promoted: str
    by: str
    crc32c: int


@dataclass(frozen=True)
class Current:
    """What ``current.json`` says.

    Attributes:
        model: The current model.
        history: All promotions and rollbacks, oldest first.
    """

    model: Model
    history: list[Event]

    @property
    def before(self) -> list[int]:
        """Numbers of the models that rollbacks would go to, the nearest last."""
        return rollback_line(self.history)[:-1]


def models_folder(store: Store, dataset: str) -> Store:
    """Return the folder of the data set's models."""
    return store.child(check_name("dataset", dataset), "models")


def list_models(store: Store, dataset: str) -> list[Model]:
    """Return all models of a data set, by number: those that are or were current, and those that never were.

    Args:
        store: The store that holds the data set.
        dataset: Name of the data set.

    Raises:
        StoreError: An entry is damaged or of another version, or the store cannot be read.
    """
    folder = models_folder(store, dataset)
    found = []
    for number in _numbers(folder):
        try:
            found.append(_entry(folder, number))
        except NotFound:  # a promotion that is under way, or was killed
            continue
    return found


def read_current(store: Store, dataset: str) -> Current | None:
    """Return the current model with its history; None where nothing was ever promoted.

    Args:
        store: The store that holds the data set.
        dataset: Name of the data set.

    Raises:
        StoreError: ``current.json`` is damaged or of another version, or the store cannot be read.
    """
    folder = models_folder(store, dataset)
    try:
        return _as_current(folder, folder.read_json(CURRENT_FILE))
    except NotFound:
        return None


def models_in_use(store: Store, dataset: str) -> list[Model]:
    """Return the current model and the one that a rollback would go to, where there are such models.

    Args:
        store: The store that holds the data set.
        dataset: Name of the data set.

    Raises:
        StoreError: ``current.json`` or an entry is damaged or of another version, or the store cannot be read.
    """
    current = read_current(store, dataset)
    if current is None:
        return []
    folder = models_folder(store, dataset)
    return [_entry(folder, number) for number in {current.model.number, *rollback_line(current.history)[-2:]}]


def current_model(store: Store, dataset: str) -> Model | None:
    """Return the current model; as :func:`read_current`, without the history."""
    current = read_current(store, dataset)
    return None if current is None else current.model


def find_model(store: Store, dataset: str, which: str | int) -> Model:
    """Return a model.

    Args:
        store: The store that holds the data set.
        dataset: Name of the data set.
        which: "current", or the model's number.

    Raises:
        BadInput: There is no such model.
        StoreError: Its entry is damaged or of another version, or the store cannot be read.
    """
    folder = models_folder(store, dataset)
    if which == CURRENT:
        model = current_model(store, dataset)
        if model is None:
            raise BadInput(f"{folder.url}: no model was promoted yet; promote a run's: geostream models promote")
        return model
    if not str(which).isdecimal() or int(which) < 1:
        raise BadInput(f"model {which}: write {CURRENT}, or a model's number")
    try:
        return _entry(folder, int(which))
    except NotFound as error:
        there = ", ".join(str(model.number) for model in list_models(store, dataset)) or "none"
        raise BadInput(f"{folder.url}: no model {which} (there: {there})") from error


def model_checkpoint(store: Store, dataset: str, which: str | int) -> tuple[str, str]:
    """Return the names of the run and the checkpoint that a model was promoted from; as :func:`find_model`.

    They may be gone by now. The model's own copy is opened by :func:`open_model`.
    """
    model = find_model(store, dataset, which)
    return model.run, model.checkpoint


def open_model(store: Store, layout: Layout, which: str | int, cluster: str | None = None) -> tuple[Run, Model]:
    """Open a model's folder, as a run that has settings and one checkpoint, :attr:`Model.checkpoint`.

    What is made with it (embeddings, evaluations) is written into the model's folder.

    Args:
        store: The store that holds the data set.
        layout: The layout to read.
        which: "current", or the model's number.
        cluster: URL of a Dask scheduler for the jobs; None uses threads of this process.

    Raises:
        BadInput: There is no such model.
    """
    model = find_model(store, layout.dataset, which)
    opened = Run(store, layout, model.run, cluster)
    opened.folder = model_folder(store, layout.dataset, model.number)
    return opened, model


def model_folder(store: Store, dataset: str, number: int) -> Store:
    """Return the folder with a model's settings and weights."""
    return models_folder(store, dataset).child(_name(number))


def promote(
    run: Run,
    checkpoint: str,
    metrics: Mapping[str, Any],
    *,
    over: int | None,
    by: By,
    compared: Mapping[str, Any] | None = None,
) -> Model:
    """Make a checkpoint the current model.

    A checkpoint that is current already stays so, and nothing is written. One that was a model before becomes current
    again under its number.

    Args:
        run: The run, or a model opened by :func:`open_model`, on the layout that the metrics were measured on.
        checkpoint: Name of the checkpoint.
        metrics: What an evaluation of it gave.
        over: Number of the model that is current, as far as the caller knows; None if there is none.
        by: Who promotes.
        compared: What it was compared with, and the result.

    Returns:
        The model, which is current now.

    Raises:
        Changed: Another model is current by now. The entry stays, but is not current.
        BadInput: There is no such checkpoint.
        StoreError: The checkpoint is damaged, or the store fails.
    """
    store, dataset = run.store, run.layout.dataset
    folder = models_folder(store, dataset)
    current = read_current(store, dataset)
    if current is not None and is_model(current.model, run, checkpoint):
        return current.model
    _check_over(folder, current, over)
    result = None if compared is None else dict(compared)
    known = [model for model in list_models(store, dataset) if is_model(model, run, checkpoint)]
    model = known[0] if known else _register(folder, run, checkpoint, dict(metrics), by, result)

    def moved(document: Any) -> Any:
        before = None if document is None else _as_current(folder, document)
        _check_over(folder, before, over)
        return _document(model, [*(before.history if before else ()), _event(model, PROMOTED, by, result)])

    folder.update_json(CURRENT_FILE, moved)
    return model


def rollback(store: Store, dataset: str, by: By = "by hand") -> Model:
    """Make the model current that was so before the current one; done twice, it goes one further back.

    A promotion after a rollback begins from the model that was rolled back to: the models after that one are no longer
    in the line of rollbacks. They stay on the store and in the history.

    Args:
        store: The store that holds the data set.
        dataset: Name of the data set.
        by: Who rolls back.

    Returns:
        The model that is current now.

    Raises:
        BadInput: Nothing was promoted yet, or there is no model before the current one.
        Changed: Another model is current by now.
    """
    folder = models_folder(store, dataset)
    seen = find_model(store, dataset, CURRENT)

    def moved(document: Any) -> Any:
        current = _as_current(folder, document)
        _check_over(folder, current, seen.number)
        if not current.before:
            raise BadInput(f"{folder.url}: no model was current before model {seen.number}; promote another instead")
        model = _entry(folder, current.before[-1])
        return _document(model, [*current.history, _event(model, ROLLED_BACK, by, None)])

    return _as_current(folder, folder.update_json(CURRENT_FILE, moved)).model


def _register(
    folder: Store, run: Run, checkpoint: str, metrics: dict[str, Any], by: By, compared: dict[str, Any] | None
) -> Model:
    """Claim a number, copy the checkpoint's weights, and write the entry."""
    number = max(_numbers(folder), default=0) + 1
    while True:
        copy = folder.child(_name(number))
        try:
            copy.write_json(SETTINGS, run.settings.model_dump(), if_absent=True)
            break
        except AlreadyExists:
            number += 1
    model = Model(
        number=number,
        run=run.name,
        checkpoint=checkpoint,
        epoch=read_position(run.folder, checkpoint).epoch,
        layout={"name": run.layout.name, "id": run.layout.id},
        gallery=run.layout.info.get("gallery"),
        metrics=metrics,
        code=code_version(),
        compared=compared,
        promoted=_now(),
        by=by,
        crc32c=copy_weights(run.folder, checkpoint, copy),
    )
    folder.write_json(f"{_name(number)}.json", {"format": FORMAT} | asdict(model), if_absent=True)
    return model


def code_version() -> dict[str, str | None]:
    """Return the ``version`` of geostream, and the git ``commit`` if it runs from a checkout, else None."""
    checkout, commit = Path(geostream.__file__).parents[1], None
    if (checkout / ".git").exists():
        try:
            asked = subprocess.run(
                ["git", "-C", str(checkout), "rev-parse", "HEAD"],
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            )
            commit = asked.stdout.strip()
        except (OSError, subprocess.SubprocessError):  # no git here, or it refuses this folder's owner
            commit = None
    return {"version": geostream.__version__, "commit": commit}


def is_model(model: Model, run: Run, checkpoint: str) -> bool:
    """Return whether a checkpoint is the one that a model was promoted from, with the same weights."""
    named = (model.run, model.checkpoint) == (run.name, checkpoint)
    return named and model.crc32c == weights_checksum(run.folder, checkpoint)


def _check_over(folder: Store, current: Current | None, over: int | None) -> None:
    number = None if current is None else current.model.number
    if number != over:
        now = "no model is current any more" if number is None else f"model {number} was made current meanwhile"
        raise Changed(f"{folder.url}: {now}; look at it (geostream models list), and try again")


def rollback_line(history: Sequence[Event]) -> list[int]:
    """Return the numbers of the models in the line of rollbacks; the current one is the last.

    Args:
        history: All promotions and rollbacks, oldest first.

    Raises:
        IndexError: There are more rollbacks than promotions.
    """
    line: list[int] = []
    for event in history:
        if event["what"] == PROMOTED:
            line.append(event["number"])
        else:
            line.pop()
    return line


def _event(model: Model, what: str, by: By, compared: dict[str, Any] | None) -> Event:
    return {"number": model.number, "what": what, "at": _now(), "by": by, "compared": compared}


def _document(model: Model, history: list[Event]) -> dict[str, Any]:
    return {"format": FORMAT, "number": model.number, "model": asdict(model), "history": history}


def _as_current(folder: Store, document: Any) -> Current:
    where = f"{folder.url}/{CURRENT_FILE}"
    model = _as_model(where, document, "model")
    try:
        history = list(document["history"])
        rollback_line(history)
    except (KeyError, TypeError, IndexError) as error:
        raise StoreError(f"{where}: damaged; its history does not say which models were current") from error
    return Current(model, history)


def _entry(folder: Store, number: int) -> Model:
    path = f"{_name(number)}.json"
    return _as_model(f"{folder.url}/{path}", folder.read_json(path))


def _as_model(where: str, document: Any, part: str | None = None) -> Model:
    """Return the model of a document, or of a part of it."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise StoreError(f"{where}: written by another version of geostream, or damaged; use that version")
    try:
        values = document if part is None else document[part]
        return Model(**{field.name: values[field.name] for field in fields(Model)})
    except (KeyError, TypeError) as error:
        raise StoreError(f"{where}: damaged; it does not describe a model ({error})") from error


def _numbers(folder: Store) -> list[int]:
    return sorted(int(name) for name in folder.folders() if NUMBER.fullmatch(name))


def _name(number: int) -> str:
    return f"{number:04d}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
