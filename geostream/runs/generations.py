"""Which generations of a layout are there, who needs them, and which may go.

Decides that a generation is removed only where a committed one descends from it and no run needs it. A run needs what
it would go on with or be looked at with: the layouts of all its checkpoints, of the plan of its newest epoch, and the
one its ``layout.json`` names. A run that says none of this, or not legibly, needs everything: keeping costs disk space,
removing costs the run. Of folders that were never committed, a reclustering's goes when nobody was at work in it for a
day; the sharding's never does, it can be gone on with. Of a layout that goes, the objects that were written down as its
own are removed; what else somebody has put into its folder stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from geostream.errors import BadInput, NotFound, StoreError
from geostream.layout import layout_infos
from geostream.layout.files import JOB, TABLES, object_names, read_info, shard_names
from geostream.reclustering.rewrite import GOING, ancestors
from geostream.runs.run import needed_layouts
from geostream.store import Store, check_name

IDLE = timedelta(days=1)  # without a sign of life, after which a reclustering counts as given up


@dataclass(frozen=True)
class Generation:
    """A layout's folder. ``keep``: why it stays, in words; "" where nothing speaks for it."""

    name: str
    number: int | None  # None: not committed
    parent: str  # name of the generation before, its id where that is gone, "" where there is none
    bytes: int
    runs: tuple[str, ...]  # that need it
    keep: str


def list_generations(store: Store, dataset: str) -> list[Generation]:
    """Every layout of the dataset, oldest generation first, then what was never committed."""
    infos = layout_infos(store, dataset)
    layouts = store.child(check_name("dataset", dataset), "layouts")
    runs = store.child(dataset, "runs")
    says = {run: needed_layouts(runs.child(run)) for run in runs.folders()}
    needs = {run: ids for run, ids in says.items() if ids or runs.list(run)}  # a local folder may be empty
    begun = [
        _unfinished(layouts.child(name), name)
        for name in layouts.folders()
        if name not in infos and any(map(layouts.child(name).exists, (JOB, GOING)))  # else it is none of ours
    ]
    # What a reclustering reads from stays until it is done or given up.
    sources = {parent: found.name for found, parent in begun if found.keep}
    names = {info["id"]: name for name, info in infos.items()}
    descended = {one for info in infos.values() for one in ancestors(info)[:-1]}
    committed = []
    for name, info in sorted(infos.items(), key=lambda item: (item[1]["generation"], item[0])):
        of_runs = tuple(run for run, ids in needs.items() if ids is None or info["id"] in ids)
        unsaid = [run for run in of_runs if needs[run] is None]
        keep = ""
        if info["id"] not in descended:
            keep = "the newest of its line"
        elif len(unsaid) < len(of_runs):
            keep = f"needed by run {next(run for run in of_runs if run not in unsaid)}"
        elif unsaid:
            keep = f"run {unsaid[0]} does not say which layout it needs; delete it if it is none"
        elif info["id"] in sources:
            keep = f"{sources[info['id']]} is being made from it"
        parent = names.get(info["parent"], info["parent"] or "")
        committed.append(Generation(name, info["generation"], parent, info["bytes"], of_runs, keep))
    return committed + [found for found, _ in begun]


def prune(store: Store, dataset: str, *, dry_run: bool = False) -> list[Generation]:
    """Remove what :func:`list_generations` finds no reason to keep; returns its list from before.

    ``dry_run``: remove nothing. Killed in between, the next call finishes what it began: ``layout.json`` goes first, so
    that nothing half removed reads as committed.
    """
    found = list_generations(store, dataset)
    for one in found:
        if not one.keep and not dry_run:
            _remove(store.child(dataset, "layouts", one.name), committed=one.number is not None)
    return found


def _unfinished(folder: Store, name: str) -> tuple[Generation, str]:
    """A folder without a commit, and the id of the layout it is made from."""
    size = sum(info.size for info in folder.list())
    keep, parent = "not committed; if its sharding was cut off, run the same command again, or delete the folder", ""
    try:
        job: dict[str, Any] = folder.read_json(JOB)
        if "order" in job:
            parent, _ = str(job["parent"]), int(job["shards"])
            idle = datetime.now(UTC) - datetime.fromisoformat(job["alive"])
            keep = "a reclustering under way, or cut off within a day: run it again to go on" if idle < IDLE else ""
    except NotFound:
        keep = "" if folder.exists(GOING) else keep
    except (StoreError, KeyError, TypeError, ValueError):
        keep = f"not committed, and its {JOB} is damaged; delete the folder if nobody is at work in it"
    return Generation(name, None, parent, size, (), keep), parent


def _remove(folder: Store, *, committed: bool) -> None:
    """Remove a layout's objects, those that were written down when it was made, and nothing else in its folder.

    Cut off at any moment, it is either committed and whole or marked as going.
    """
    objects = _committed_objects(folder) if committed else _begun_objects(folder)
    folder.write_json(GOING, {"objects": objects})
    if not committed and _unfinished(folder, "")[0].keep:  # somebody went on with it just now
        folder.delete(GOING)
        return
    for file in ("layout.json", *TABLES):
        folder.delete(file)
    folder.delete_all([*objects, JOB])
    folder.delete_all([GOING])


def _committed_objects(folder: Store) -> list[str]:
    """Names of what a committed layout consists of, and of what making it may have left."""
    return object_names([shard["name"] for shard in read_info(folder)["shards"]])


def _begun_objects(folder: Store) -> list[str]:
    """Names of what a folder without a commit may hold, as its job says, or an earlier removal that was cut off."""
    try:
        return object_names(shard_names(int(folder.read_json(JOB)["shards"])))
    except NotFound:
        names: list[str] = folder.read_json(GOING).get("objects", [])
        return names


def check_dataset(store: Store, dataset: str | None) -> str:
    """The dataset asked for, or the only one with layouts. Raises BadInput where there is none, or several."""
    found = [name for name in store.folders() if "layouts" in store.folders(name)]
    if dataset in found:
        return check_name("dataset", dataset)
    if dataset is None and len(found) == 1:
        return found[0]
    have = ", ".join(found) or "none; shard one first: geostream shard vigor RAW STORE"
    wrong = "say which dataset with --dataset" if dataset is None else f"no layouts of a dataset {dataset!r}"
    raise BadInput(f"{store.url}: {wrong} (there: {have})")
