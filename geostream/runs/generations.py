"""List the layouts of a data set, find out who needs them, and remove those that nobody needs.

A layout is needed if it is the current one, has a tag, is needed by a run, by a model in use or by an index, or if
another one is being made from it, or if a layout of another data set joins it (:mod:`geostream.runs.retention` has the
rules). Of joined layouts of the same data sets, one is an older one of the line if it joins older layouts, or the same,
of each. A run needs the layouts of all its checkpoints, the layout of its newest plan, and the one that its
``layout.json`` names. A run whose files do not say this legibly is taken to need every layout: keeping one costs disk
space, removing it could cost the run.

A layout that an append made reads shards of the layouts before it. Those stay as long as it does. A folder that was
never committed is removed if it belongs to a reclustering that has shown no sign of life for a day. An unfinished
sharding is never removed, because it can be resumed. A join that was cut off, which takes seconds to make again, is
removed by name at once, and by :func:`prune` after a day. Only the objects that belong to a layout are removed; other
files in its folder stay.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from geostream.errors import BadInput, LayoutNotCommitted, NotFound, StoreError
from geostream.layout import layout_infos
from geostream.layout.current import current_or_newest
from geostream.layout.files import GOING, JOB, TABLES, layouts_folder, object_names, read_info, shard_names
from geostream.layout.lineage import ancestors, joined_in
from geostream.layout.tags import find_layout, read_tags
from geostream.runs.inventory import index_layouts
from geostream.runs.models import models_in_use
from geostream.runs.retention import LayoutFacts, LayoutNeeds, layouts_to_keep, superseded, why_not_removed
from geostream.runs.run import needed_layouts
from geostream.store import NAME, Store, check_name

IDLE = timedelta(days=1)  # a reclustering or join without a sign of life for so long counts as given up
JOIN_BEGUN = "join begun"


@dataclass(frozen=True)
class Generation:
    """A layout's folder on the store.

    Attributes:
        name: The layout's name.
        number: Its generation; None if it was never committed.
        parent: Name of the layout that it was made from, its id if that one is gone, "" if there is none.
        bytes: Size of its own shards in bytes; of a folder that was never committed, of all its objects.
        runs: Names of the runs that need it.
        keep: The reason to keep it, in words; "" if there is none.
        borrowed: Bytes of the shards that it reads from other layouts.
        kind: "sharded", "appended", "reclustered" or "joined"; "join begun" or "begun" for one never committed.
        places: Number of its places; None for one that was never committed.
        gallery: Id of its test gallery; None if it names none.
        tags: Its tags.
        is_current: Whether it is opened where no layout is named.
    """

    name: str
    number: int | None
    parent: str
    bytes: int
    runs: tuple[str, ...] = ()
    keep: str = ""
    borrowed: int = 0
    kind: str = "begun"
    places: int | None = None
    gallery: str | None = None
    tags: tuple[str, ...] = ()
    is_current: bool = False


class _Found(NamedTuple):
    """What there is of a data set: layout.json of each layout, facts, needs, folders begun with their parents' ids."""

    infos: dict[str, dict[str, Any]]
    facts: list[LayoutFacts]
    needs: LayoutNeeds
    begun: list[tuple[Generation, str]]


def list_generations(store: Store, dataset: str) -> list[Generation]:
    """List every layout of a dataset with the reason to keep it.

    Args:
        store: The store that holds the dataset.
        dataset: The dataset's name.

    Returns:
        Committed layouts, oldest generation first, then the folders that were never committed.

    Raises:
        BadInput: ``dataset`` is not a valid name.
        StoreError: The store cannot be read, or a file that says who needs what is damaged.
    """
    found = _find(store, dataset)
    keep = layouts_to_keep(found.facts, found.needs)
    names = {info["id"]: name for name, info in found.infos.items()}
    committed = []
    for name, info in sorted(found.infos.items(), key=lambda item: (item[1]["generation"], item[0])):
        own, borrowed = (
            sum(shard["size"] for shard in info["shards"] if (shard.get("layout") is not None) == other)
            for other in (False, True)
        )
        committed.append(
            Generation(
                name,
                info["generation"],
                names.get(info["parent"], info["parent"] or ""),
                own,
                tuple(run for run, ids in found.needs.runs.items() if ids is None or info["id"] in ids),
                keep[name],
                borrowed,
                _kind(info),
                info["places"],
                info.get("gallery"),
                tuple(sorted(tag for tag, one in found.needs.tags.items() if one == info["id"])),
                info["id"] == found.needs.current,
            )
        )
    return committed + [one for one, _ in found.begun]


def _find(store: Store, dataset: str) -> _Found:
    infos = layout_infos(store, dataset)
    layouts = layouts_folder(store, dataset)
    runs = store.child(dataset, "runs")
    begun = [
        _unfinished(layouts.child(name), name)
        for name in layouts.folders()
        if name not in infos and any(map(layouts.child(name).exists, (JOB, GOING)))  # other folders are not layouts
    ]
    replaced = superseded({name: _joined_lines(store, info) for name, info in infos.items() if joined_in(info)})
    facts = [
        LayoutFacts(
            name,
            info["id"],
            frozenset([*ancestors(info)[:-1], *(infos[older]["id"] for older in replaced.get(name, ()))]),
            frozenset(shard["layout"] for shard in info["shards"] if shard.get("layout") and not shard.get("dataset")),
        )
        for name, info in sorted(infos.items())
    ]
    current = current_or_newest(store, dataset, infos)
    needs = LayoutNeeds(
        current=None if current is None else current.id,
        tags={tag: one.id for tag, one in read_tags(store, dataset).items()},
        runs={run: needed_layouts(runs.child(run)) for run in runs.folders()},
        models={f"model {model.number}": model.layout["id"] for model in models_in_use(store, dataset)},
        indexes=index_layouts(store, dataset),
        # The layout that a new one is made from stays until that one is committed or given up.
        under_way={one.name: parent for one, parent in begun if one.keep},
        joins=_joins(store, dataset),
    )
    return _Found(infos, facts, needs, begun)


def _joined_lines(store: Store, info: dict[str, Any]) -> dict[str, list[str]]:
    """Return for each data set that a layout joins the ids of the layout's ancestors there, its own last."""
    found = dict[str, list[str]]()
    for one in joined_in(info):
        with suppress(LayoutNotCommitted):
            of_part = read_info(layouts_folder(store, one.dataset).child(one.layout))
            found[one.dataset] = ancestors(of_part) if of_part["id"] == one.id else []
        found[one.dataset] = found.get(one.dataset) or [one.id]
    return found


def _joins(store: Store, dataset: str) -> dict[str, set[str]]:
    """Return the names of the data set's layouts that joined layouts of other data sets read, by "data set/layout".

    These are the layouts that are joined, which a model is evaluated on, and those that have their shards.
    """
    found = dict[str, set[str]]()
    for other in store.folders():
        if other == dataset or not NAME.fullmatch(other):
            continue
        infos, layouts = layout_infos(store, other), layouts_folder(store, other)
        for name, info in infos.items():
            read = {one.layout for one in joined_in(info) if one.dataset == dataset}
            read |= {shard["layout"] for shard in info["shards"] if shard.get("dataset") == dataset}
            found |= {f"{other}/{name}": read} if read else {}
        for name in set(layouts.folders()) - set(infos):
            with suppress(NotFound):
                read = {
                    joined[1] for joined in layouts.read_json(f"{name}/{JOB}").get("joins", []) if joined[0] == dataset
                }
                found |= {f"{other}/{name}, which is being made": read} if read else {}
    return found


def _kind(info: dict[str, Any]) -> str:
    if info["parent"] is None:
        return "joined" if joined_in(info) else "sharded"
    return "reclustered" if "order" in info["source"] else "appended"


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
    for one in reversed(found):  # those that borrow shards before those that lend them
        if not one.keep and not dry_run:
            _remove(store.child(dataset, "layouts", one.name), one)
    return found


def remove(store: Store, dataset: str, name: str) -> Generation:
    """Remove one layout, which may be the newest of its line.

    Args:
        store: The store that holds the dataset.
        dataset: The dataset's name.
        name: Name or tag of the layout, or the name of a reclustering that was begun and given up, or of a join that
            was cut off.

    Returns:
        The layout as it was.

    Raises:
        BadInput: The layout is needed; the message says by whom.
        LayoutNotCommitted: There is no such layout.
        StoreError: The store cannot be read or written.
    """
    found = {one.name: one for one in list_generations(store, dataset)}
    if name not in found:
        folder, _ = find_layout(store, dataset, name)  # raises LayoutNotCommitted
        name = folder.url.rpartition("/")[2]
    one, folder = found[name], store.child(dataset, "layouts", name)
    if one.number is None:
        reason = "" if one.kind == JOIN_BEGUN else one.keep
    else:
        now = _find(store, dataset)
        reason = why_not_removed(name, now.facts, now.needs)
    if reason:
        raise BadInput(f"{folder.url}: not removed: {reason}")
    _remove(folder, one)
    return one


def _unfinished(folder: Store, name: str) -> tuple[Generation, str]:
    """Describe a folder that was never committed, and return the id of the layout that it is made from ("": none)."""
    objects, kind = {info.path: info for info in folder.list()}, "begun"
    keep, parent = "not committed; if its sharding was cut off, run the same command again, or delete the folder", ""
    try:
        job: dict[str, Any] = folder.read_json(JOB)
        parent = str(job.get("parent", ""))
        if "order" in job:
            parent, _ = str(job["parent"]), int(job["shards"])
            idle = datetime.now(UTC) - datetime.fromisoformat(job["alive"])
            keep = "a reclustering under way, or cut off within a day: run it again to go on" if idle < IDLE else ""
        elif "joins" in job:
            kind, age = JOIN_BEGUN, datetime.now(UTC) - objects[JOB].modified
            keep = "a join that was cut off, if it is not under way; run it again, or remove it" if age < IDLE else ""
    except NotFound:
        keep = "" if folder.exists(GOING) else keep
    except (StoreError, KeyError, TypeError, ValueError):
        keep = f"not committed, and its {JOB} is damaged; delete the folder if nobody is at work in it"
    return Generation(name, None, parent, sum(info.size for info in objects.values()), keep=keep, kind=kind), parent


def _remove(folder: Store, one: Generation) -> None:
    """Remove the objects that belong to a layout, and nothing else in its folder.

    If this is killed at any moment, the layout is either still committed and whole, or marked by the file ``GOING``.
    """
    committed = one.number is not None
    objects = _committed_objects(folder) if committed else _begun_objects(folder)
    folder.write_json(GOING, {"objects": objects})
    if not committed and _resumed(folder, one):
        folder.delete(GOING)
        return
    for file in ("layout.json", *TABLES):
        folder.delete(file)
    folder.delete_all([*objects, JOB])
    folder.delete_all([GOING])


def _resumed(folder: Store, one: Generation) -> bool:
    """Return whether somebody committed or resumed a layout just now that is to be removed unfinished."""
    by_name = one.keep != ""  # a join, by a person who says that it is not under way
    return folder.exists("layout.json") or (not by_name and _unfinished(folder, "")[0].keep != "")


def _committed_objects(folder: Store) -> list[str]:
    """Return the names of a committed layout's objects, and of those that making it may have left behind."""
    own = [shard["name"] for shard in read_info(folder)["shards"] if shard.get("layout") is None]
    return object_names(own)


def _begun_objects(folder: Store) -> list[str]:
    """Return the names of the objects of an uncommitted layout, from its job or from an earlier, unfinished removal."""
    try:
        job: dict[str, Any] = folder.read_json(JOB)
        return object_names(shard_names(0 if "joins" in job else int(job["shards"])))  # a join writes none
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
