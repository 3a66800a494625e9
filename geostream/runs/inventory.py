"""Describe a data set's runs: what they did, what they take on the store; and remove those that nobody needs.

Only objects with the names that a run's own are made with are removed, and of the checkpoints only those that the run
has written. Whatever else lies in the folder stays, and is told.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from geostream.errors import BadInput, NotFound, StoreError
from geostream.runs.lease import FOLDER as LEASES
from geostream.runs.lease import Lease, RunHeld, is_held
from geostream.runs.log import RunLog, RunResult
from geostream.runs.models import models_in_use
from geostream.runs.retention import Rule, RunFacts, runs_to_keep
from geostream.runs.run import LAYOUT, LOG, LONG_HELD, SETTINGS
from geostream.settings import default_settings, make_settings
from geostream.store import ObjectInfo, Store, check_name
from geostream.training.checkpoint_files import WRITTEN

PARTS = {"checkpoints": "checkpoints", "embeddings": "embeddings", "neighbours": "graphs", "plans": "plans"}
PARTS |= {"prepared": "plans"}  # what lies in each folder of a run
_EPOCH = r"epoch-\d{4,}"
_SPLIT = rf"([\w-]+-)?{_EPOCH}"
_ZARR = r"(\w+/)?(zarr\.json|c(/\d+)+|scratch/[a-z-]+-\d+|scratch/made\.json)"
OWN = re.compile(
    "|".join(
        (
            r"(settings|layout|best|evaluation|comparison|tested)\.json|metrics\.jsonl|report\.html",
            rf"evaluation-[\w-]+-{_EPOCH}\.(json|html)",
            rf"plans/{_EPOCH}\.(json|parquet)",
            rf"prepared/{_EPOCH}\.jsonl",
            rf"embeddings/{_SPLIT}\.zarr/{_ZARR}",
            rf"neighbours/(gps|visual-{_EPOCH})\.zarr/{_ZARR}",
            r"tensorboard/events\.out\.tfevents\.0\.geostream",
            rf"{LEASES}/\d{{8}}\.json",
            re.escape(WRITTEN),
        )
    )
)
CHECKPOINT = re.compile(r"checkpoints/(step-\d{8,})/((model|optimizer)\.safetensors|state\.json)")
INDEX_FILE = "index.json"  # of an index: present means committed
LAST = (SETTINGS, WRITTEN, LOG)  # removed last, so that a removal that was cut off is finished by the next


@dataclass(frozen=True)
class RunSummary:
    """A run, as it lies on the store.

    Attributes:
        name: Its name.
        layout: Name of the layout that it reads; None if it has not recorded one.
        epochs: How many it has trained.
        wanted: How many it is to train; None without readable settings.
        r1: Its best R@1, from 0 to 1; None if it was never evaluated.
        state: "training" if a process holds it, else "finished", "stopped", or "not begun" without settings.
        began: When its first record began; None without records.
        ended: When its last record ended; None without records.
        last: When the last of its objects was written, its lease apart.
        bytes: Bytes of its checkpoints, embeddings, graphs and plans, and of other objects.
    """

    name: str
    layout: str | None
    epochs: int
    wanted: int | None
    r1: float | None
    state: str
    began: datetime | None
    ended: datetime | None
    last: datetime
    bytes: Mapping[str, int]


def indexes_folder(store: Store, dataset: str) -> Store:
    """Return the folder of the data set's indexes (:mod:`geostream.locating.index`)."""
    return store.child(check_name("dataset", dataset), "indexes")


def index_names(folder: Store) -> list[str]:
    """Return the names of the committed indexes in a data set's folder of indexes."""
    return [name for name in folder.folders() if folder.exists(f"{name}/{INDEX_FILE}")]


def index_layouts(store: Store, dataset: str) -> dict[str, str]:
    """Return the id of the layout whose tiles each index holds, by the index's name.

    Args:
        store: The store that holds the data set.
        dataset: The data set's name.

    Raises:
        StoreError: An index cannot be read, or is damaged.
    """
    folder, found = indexes_folder(store, dataset), {}
    for name in folder.folders():
        try:
            found[name] = str(folder.read_json(f"{name}/{INDEX_FILE}")["layout"]["id"])
        except NotFound:  # it is being made, or its making was killed
            continue
        except (KeyError, TypeError) as error:
            raise StoreError(
                f"{folder.url}/{name}/{INDEX_FILE}: damaged; it does not say which layout it needs"
            ) from error
    return found


def list_runs(store: Store, dataset: str) -> list[RunSummary]:
    """Describe all runs of a data set, by a listing and three small objects of each.

    Args:
        store: The store that holds the data set.
        dataset: The data set's name.

    Returns:
        The runs, the one that did something last at the end.
    """
    runs = store.child(check_name("dataset", dataset), "runs")
    found = [(runs.child(name), name, runs.list(name)) for name in runs.folders()]
    return sorted(
        (_summary(folder, name, objects) for folder, name, objects in found if objects),  # a local folder may be empty
        key=lambda run: (run.last, run.name),
    )


def _summary(folder: Store, name: str, objects: list[ObjectInfo]) -> RunSummary:
    records = _records(folder)
    trained = max((record["epoch"] for record in records if record["stage"] == "train"), default=0)
    r1 = [record["r1"] for record in records if record["stage"] == "evaluate"]
    wanted = _epochs_wanted(folder)
    began = [record["started"] for record in records if "started" in record]  # older logs do not say
    ended = [record["started"] + record["seconds"] for record in records if "started" in record]
    sizes = dict.fromkeys([*PARTS.values(), "other"], 0)
    for one in objects:
        sizes[PARTS.get(one.path.split("/")[1], "other")] += one.size
    if is_held(folder):
        state = "training"
    elif wanted is None:
        state = "not begun"
    else:
        state = "finished" if trained >= wanted else "stopped"
    return RunSummary(
        name,
        _layout(folder),
        trained,
        wanted,
        max(r1, default=None),
        state,
        datetime.fromtimestamp(min(began), UTC) if began else None,
        datetime.fromtimestamp(max(ended), UTC) if ended else None,
        max(one.modified for one in [o for o in objects if o.path.split("/")[1] != LEASES] or objects),
        sizes,
    )


@dataclass(frozen=True)
class RunDetails:
    """What one run did.

    Attributes:
        summary: The run in short.
        url: URL of its folder.
        changed: (name, value of the recipe, value of the run) of each setting that differs from the data set's recipe.
        result: What its log tells.
    """

    summary: RunSummary
    url: str
    changed: list[tuple[str, Any, Any]]
    result: RunResult


def describe_run(store: Store, dataset: str, name: str) -> RunDetails:
    """Describe one run of a data set.

    Args:
        store: The store that holds the data set.
        dataset: The data set's name.
        name: The run's name.

    Raises:
        BadInput: There is no such run.
        StoreError: Its log is damaged, or the store cannot be read.
    """
    runs = store.child(check_name("dataset", dataset), "runs")
    folder, objects = runs.child(check_name("run", name)), runs.list(name)
    if not objects:
        raise BadInput(f"{folder.url}: no such run (there: {', '.join(runs.folders()) or 'none'})")
    try:
        settings, recipe = make_settings(folder.read_json(SETTINGS)).flat(), default_settings(dataset).flat()
    except NotFound:
        settings, recipe = {}, {}
    changed = [(one, recipe[one], value) for one, value in settings.items() if value != recipe[one]]
    result = RunResult.of(folder.url, RunLog(folder, LOG), already_finished=False)
    return RunDetails(_summary(folder, name, objects), folder.url, changed, result)


def _records(folder: Store) -> list[dict[str, Any]]:
    try:
        return RunLog(folder, LOG).records
    except StoreError:  # damaged; the list is to show the other runs nonetheless
        return []


def _epochs_wanted(folder: Store) -> int | None:
    try:
        return make_settings(folder.read_json(SETTINGS)).optim.epochs
    except (StoreError, BadInput, TypeError, AttributeError):
        return None


def _layout(folder: Store) -> str | None:
    try:
        return str(folder.read_json(LAYOUT)["layout"])
    except (StoreError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class Pruned:
    """What became of a run.

    Attributes:
        name: The run's name.
        keep: Why it stays, in words; "" for one that was removed.
        bytes: Bytes that were removed, or would be.
        left: Paths of what stays in its folder because it is not the run's.
    """

    name: str
    keep: str
    bytes: int = 0
    left: tuple[str, ...] = ()


def prune_runs(store: Store, dataset: str, rule: Rule, *, dry_run: bool = False) -> list[Pruned]:
    """Remove the runs that the rule does not keep, that no model in use needs, and that no process holds.

    A call that is killed halfway is finished by the next one.

    Args:
        store: The store that holds the data set.
        dataset: The data set's name.
        rule: Which runs to keep.
        dry_run: Remove nothing, only say what would be.

    Returns:
        What became of each run, the newest first.

    Raises:
        BadInput: The rule names a run that is not there.
        StoreError: The store cannot be read or written.
    """
    runs = store.child(check_name("dataset", dataset), "runs")
    found = list_runs(store, dataset)
    if unknown := sorted(rule.named - {run.name for run in found}):
        raise BadInput(f"{runs.url}: no run {unknown[0]}; its name may be misspelt, so nothing was removed")
    facts = [RunFacts(run.name, run.last, is_held(runs.child(run.name), within=LONG_HELD)) for run in found]
    models = {model.run: f"model {model.number}" for model in models_in_use(store, dataset)}
    kept = runs_to_keep(facts, models, rule, datetime.now(UTC))
    return [Pruned(name, keep) if keep else _removed(runs.child(name), name, dry_run) for name, keep in kept.items()]


def _removed(folder: Store, name: str, dry_run: bool) -> Pruned:
    """Remove a run, or say what would be removed; it is held meanwhile, so that nobody begins to train it."""
    if dry_run:
        own, left = _own_objects(folder)
        return Pruned(name, "", sum(one.size for one in own), left)
    try:
        with Lease(folder):
            own, left = _own_objects(folder)
            own = [one for one in own if not one.path.startswith(f"{LEASES}/")]  # goes with the lease
            folder.delete_all(one.path for one in own if one.path not in LAST)
            for path in LAST:
                folder.delete_all([path])
    except RunHeld:
        return Pruned(name, "a process works on it now")
    return Pruned(name, "", sum(one.size for one in own), left)


def _own_objects(folder: Store) -> tuple[list[ObjectInfo], tuple[str, ...]]:
    """Return the objects of a run, and the paths of what else lies in its folder."""
    objects, own = folder.list(), []
    written = _written(folder)
    for one in objects:
        checkpoint = CHECKPOINT.fullmatch(one.path)
        if OWN.fullmatch(one.path) or (checkpoint and (written is None or checkpoint[1] in written)):
            own.append(one)
    return own, tuple(sorted({one.path for one in objects} - {one.path for one in own}))


def _written(folder: Store) -> set[str] | None:
    """Return the names of the checkpoints that the run has written; None if it is too old to say, which means all."""
    try:
        return set(folder.read_json(WRITTEN))
    except NotFound:  # or nothing is left of the run but what is not its own
        return None if folder.exists(SETTINGS) else set()
