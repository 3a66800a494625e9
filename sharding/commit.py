"""Commit written shards as a layout; :func:`shard` does all steps of a sharding in one call.

A broken view is left out. With a broken tile its whole place is left out: its views, and its role as semi-positive of
others. So places get their ids here, when it is known which are whole. A layout that was committed from the same source
is returned at once; one from another source is never touched. The first layout of a data set becomes its current one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from geostream.errors import BadInput, NotFound
from geostream.layout import MEMBERS, PLACES, Layout, NewLayout, advance, commit_layout, open_layout
from geostream.layout.files import JOB, object_names, shard_names, sidecar_name
from geostream.store import Store, check_name
from sharding.job import ShardJob, ShardOptions, plan_shards
from sharding.places import Place, RawDataset
from sharding.workers import leave_a_starting_worker
from sharding.writer import StoredPart, StoredPlace, claimed_shards, view_name, write_shards


@dataclass(frozen=True)
class ShardReport:
    """Report what a sharding did.

    Attributes:
        layout: the committed layout.
        already: it was there before; nothing was written.
        written: shards written by this run.
        resumed: shards that an earlier run had finished.
        broken: images that were left out: ``file:line``, name and reason.
        notes: what a person should know about the raw folder and the layout.
    """

    layout: Layout
    already: bool
    written: int
    resumed: int
    broken: tuple[str, ...]
    notes: tuple[str, ...]


def shard(
    raw: RawDataset,
    store: Store,
    dataset: str,
    name: str = "base",
    options: ShardOptions | None = None,
    workers: int | None = None,
) -> ShardReport:
    """Write a data set as a layout, go on with one that was cut off, or find it done.

    It calls :func:`plan_shards`, :func:`write_shards` and :func:`commit_shards`.

    Args:
        raw: the data set, from :func:`sharding.read_places`.
        store: the root of the store.
        dataset: the data set's name in it.
        name: the layout's name.
        options: how the layout is written; None: the defaults.
        workers: processes that encode; None: one a core; 1: this one.

    Raises:
        BadInput: the options make no sense, too many images are broken, or another layout is in the folder.
        StoreError: the store cannot be reached, or refuses.
        GeostreamError: a worker process died; what is finished is kept.
    """
    leave_a_starting_worker()
    folder = layout_folder(store, dataset, name)
    if not store.is_local:
        store.check(write=True)  # before the sample is read; a local folder is made
    job = plan_shards(raw, options)
    job.check_broken(job.missing)
    if layout := committed(job, store, dataset, name):
        return _report(job, layout, already=True)
    parts, resumed = write_shards(job, folder, workers)
    return commit_shards(job, store, dataset, name, parts, resumed)


def layout_folder(store: Store, dataset: str, name: str) -> Store:
    """Return the folder of a layout, committed or not; raise BadInput for names that cannot be folders."""
    return store.child(check_name("dataset", dataset), "layouts", check_name("layout", name))


def is_committed(job: ShardJob, folder: Store) -> bool:
    """Return whether this very job was committed in the folder before; change nothing there.

    Raises:
        BadInput: a layout made from another source or with other options is committed there.
    """
    try:
        source = folder.read_json("layout.json")["source"]
    except NotFound:
        return False
    if source.get("fingerprint") != job.fingerprint:
        raise BadInput(
            f"{folder.url}: a layout of another source or with other options is committed here "
            f"({source.get('adapter')} {source.get('options')}); choose another name"
        )
    if source.get("sample") != job.sample:
        raise BadInput(f"{folder.url}: the raw images have changed since this layout was written; choose another name")
    return True


def committed(job: ShardJob, store: Store, dataset: str, name: str) -> Layout | None:
    """Return the layout where this very job was committed before, tidied up; None where nothing was committed.

    Where no layout is current yet, it becomes so: a sharding may have been killed right after its commit.

    Raises:
        BadInput: a layout made from another source or with other options is committed there.
    """
    folder = layout_folder(store, dataset, name)
    if not is_committed(job, folder):
        return None
    _clean(folder, job)
    layout = open_layout(store, dataset, name)
    advance(store, dataset, layout, None)
    return layout


def commit_shards(
    job: ShardJob, store: Store, dataset: str, name: str, parts: Sequence[StoredPart], resumed: int = 0
) -> ShardReport:
    """Index written shards and commit them as a layout.

    Args:
        job: the job that they were written for.
        store: the root of the store.
        dataset: the data set's name in it.
        name: the layout's name.
        parts: all of the job's shards, from :func:`write_shards`.
        resumed: how many of them an earlier run had finished, for the report.

    Raises:
        BadInput: too many images are broken, or nothing is left to train on or to search in.
    """
    broken = [one for part in parts for one in part.broken]
    job.check_broken(broken)
    stored = {place.key: place for part in parts for place in part.places}
    kept = [place for place in job.raw.places if place.key in stored]
    ids = {place.key: number for number, place in enumerate(kept)}
    rows = [_place_row(place, stored[place.key], ids) for place in kept]
    if not any(place.views[row].split == "train" for place in kept for row in stored[place.key].views):
        raise BadInput(f"{job.raw.root}: every training pair has a broken image, the first: {broken[0]}; mend them")
    if not any("test" in place.splits for place in kept):
        raise BadInput(f"{job.raw.root}: every tile of the test gallery is broken, the first: {broken[0]}; mend them")
    members = [
        {"place": ids[place.key], "shard": number, "member": member.name, **member._asdict()}
        for number, part in enumerate(parts)
        for place in part.places
        for member in place.members
    ]
    folder = layout_folder(store, dataset, name)
    layout = commit_layout(
        folder,
        NewLayout(
            dataset=dataset,
            name=name,
            generation=0,
            coordinates=job.raw.coordinates,
            protocols=job.raw.protocols,
            places=pa.Table.from_pylist(rows, schema=PLACES),
            members=pa.Table.from_pylist(members, schema=MEMBERS),
            shards=[(part.name, part.size) for part in parts],
            source=job.source,
            images={
                "tile_size": job.images.tile_size,
                "view_size": job.images.view_size,
                "quality": None if job.options.original else job.options.quality,
                "enlarged": sum(part.enlarged for part in parts),
            },
            broken=[str(one) for one in broken],
        ),
    )
    advance(store, dataset, layout, None)
    _clean(folder, job)
    return _report(job, layout, written=len(parts) - resumed, resumed=resumed)


def _report(job: ShardJob, layout: Layout, *, already: bool = False, written: int = 0, resumed: int = 0) -> ShardReport:
    notes = list(job.raw.notes)
    if enlarged := layout.info["images"]["enlarged"]:
        notes.append(f"{enlarged} images are smaller than the stored size and were enlarged")
    if dropped := len(job.raw.places) - layout.n_places:
        notes.append(f"{dropped} places were left out because their tile is broken")
    return ShardReport(layout, already, written, resumed, tuple(layout.info["broken"]), tuple(notes))


def _place_row(place: Place, stored: StoredPlace, ids: dict[str, int]) -> dict[str, object]:
    """Return a row of ``places.parquet``, without semi-positives that were left out."""
    views = [
        {
            "name": view_name(number),
            "split": view.split,
            "source": view.image.path,
            "north": view.north,
            "east": view.east,
            "semi_positives": sorted(ids[key] for key in view.semi_positives if key in ids),
        }
        for number, view in enumerate(place.views[row] for row in stored.views)
    ]
    return {
        "key": place.key,
        "area": place.area,
        "splits": list(place.splits),
        "north": place.north,
        "east": place.east,
        "source": place.tile.path,
        "views": views,
    }


def _clean(folder: Store, job: ShardJob) -> None:
    """Remove, by name, what jobs have written here that is no part of the layout.

    These are the sidecars, the last shards of an earlier plan that had more of them, and uploads that were killed.
    """
    try:
        claimed = claimed_shards(folder.read_json(JOB))
    except NotFound:
        claimed = 0
    shards = shard_names(max(claimed, len(job.parts)))
    sidecars = {sidecar_name(shard) for shard in shards} & {info.path for info in folder.list("parts")}
    folder.delete_all([*sidecars, *shards[len(job.parts) :]])
    folder.delete_all([JOB])  # last: the others' names follow from it
    folder.delete_unfinished([*object_names(shards), JOB])
