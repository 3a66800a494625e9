"""List the generations of a dataset's layouts, find out which runs need them, and remove those that nobody needs.

A generation is removed only if a newer committed one descends from it and no run needs it. A run needs the layouts of
all its checkpoints, the layout of its newest plan, and the one that its ``layout.json`` names. A run whose files do not
say this legibly is taken to need every generation: keeping one costs disk space, removing it could cost the run.

A folder that was never committed is removed if it belongs to a reclustering that has shown no sign of life for a day.
An unfinished sharding is never removed, because it can be resumed. Only the objects that belong to a layout are
removed; other files in its folder stay.
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

IDLE = timedelta(days=1)  # a reclustering without a sign of life for so long counts as given up


@dataclass(frozen=True)
class Generation:
    """A layout's folder on the store.

    Attributes:
        name: The layout's name.
        number: Its generation; None if it was never committed.
        parent: Name of the generation that it was made from, its id if that one is gone, "" if there is none.
        bytes: Size of the layout in bytes.
        runs: Names of the runs that need it.
        keep: The reason to keep it, in words; "" if there is none.
    """

    name: str
    number: int | None
    parent: str
    bytes: int
    runs: tuple[str, ...]
    keep: str


def list_generations(store: Store, dataset: str) -> list[Generation]:
    """List every layout of a dataset with the reason to keep it.

    Args:
        store: The store that holds the dataset.
        dataset: The dataset's name.

    Returns:
        Committed layouts, oldest generation first, then the folders that were never committed.

    Raises:
        BadInput: ``dataset`` is not a valid name.
        StoreError: The store cannot be read.
    """
    infos = layout_infos(store, dataset)
    layouts = store.child(check_name("dataset", dataset), "layouts")
    runs = store.child(dataset, "runs")
    says = {run: needed_layouts(runs.child(run)) for run in runs.folders()}
    needs = {run: ids for run, ids in says.items() if ids or runs.list(run)}  # a local folder may be empty
    begun = [
        _unfinished(layouts.child(name), name)
        for name in layouts.folders()
        if name not in infos and any(map(layouts.child(name).exists, (JOB, GOING)))  # other folders are not layouts
    ]
    # The layout that a reclustering reads from stays until the reclustering is done or given up.
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
    """Remove the layouts that :func:`list_generations` finds no reason to keep.

    A call that is killed halfway is finished by the next one. ``layout.json`` is removed first, so that a layout that
    is half removed never counts as committed.

    Args:
        store: The store that holds the dataset.
        dataset: The dataset's name.
        dry_run: Remove nothing, only return the list.

    Returns:
        The list of :func:`list_generations` from before the removal.

    Raises:
        BadInput: ``dataset`` is not a valid name.
        StoreError: The store cannot be read or written.
    """
    found = list_generations(store, dataset)
    for one in found:
        if not one.keep and not dry_run:
            _remove(store.child(dataset, "layouts", one.name), committed=one.number is not None)
    return found


def _unfinished(folder: Store, name: str) -> tuple[Generation, str]:
    """Describe a folder that was never committed, and return the id of the layout that it is made from ("": none)."""
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
    """Remove the objects that belong to a layout, and nothing else in its folder.

    If this is killed at any moment, the layout is either still committed and whole, or marked by the file ``GOING``.
    """
    objects = _committed_objects(folder) if committed else _begun_objects(folder)
    folder.write_json(GOING, {"objects": objects})
    if not committed and _unfinished(folder, "")[0].keep:  # somebody resumed it just now
        folder.delete(GOING)
        return
    for file in ("layout.json", *TABLES):
        folder.delete(file)
    folder.delete_all([*objects, JOB])
    folder.delete_all([GOING])


def _committed_objects(folder: Store) -> list[str]:
    """Return the names of a committed layout's objects, and of those that making it may have left behind."""
    return object_names([shard["name"] for shard in read_info(folder)["shards"]])


def _begun_objects(folder: Store) -> list[str]:
    """Return the names of the objects of an uncommitted layout, from its job or from an earlier, unfinished removal."""
    try:
        return object_names(shard_names(int(folder.read_json(JOB)["shards"])))
    except NotFound:
        names: list[str] = folder.read_json(GOING).get("objects", [])
        return names


def check_dataset(store: Store, dataset: str | None) -> str:
    """Return the dataset asked for, or the store's only one.

    Args:
        store: The store to look into.
        dataset: A dataset's name; None for the only dataset that has layouts.

    Raises:
        BadInput: There is no such dataset, or ``dataset`` is None and the store has none or several.
    """
    found = [name for name in store.folders() if "layouts" in store.folders(name)]
    if dataset in found:
        return check_name("dataset", dataset)
    if dataset is None and len(found) == 1:
        return found[0]
    have = ", ".join(found) or "none; shard one first: geostream shard vigor RAW STORE"
    wrong = "say which dataset with --dataset" if dataset is None else f"no layouts of a dataset {dataset!r}"
    raise BadInput(f"{store.url}: {wrong} (there: {have})")
