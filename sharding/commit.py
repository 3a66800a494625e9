"""Commit written shards as a layout.

A broken view is left out. With a broken tile its whole place is left out: its views, and its role as semi-positive of
others. So places get their ids here, when it is known which are whole. The first layout of a data set becomes its
current one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from geostream.errors import BadInput, NotFound
from geostream.layout import MEMBERS, PLACES, Layout, NewLayout, advance, commit_layout
from geostream.layout.files import JOB, object_names, shard_names, sidecar_name
from geostream.store import Store, check_name
from sharding.job import ShardJob
from sharding.places import Place
from sharding.sources import sources_file
from sharding.writer import StoredPart, claimed_shards, view_name


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
        counts: of an append, how many places came, changed, went and were left out, by what they are.
        bytes_read: of raw files, for what was written and to compare.
        bytes_written: of shards.
    """

    layout: Layout
    already: bool
    written: int
    resumed: int
    broken: tuple[str, ...]
    notes: tuple[str, ...]
    counts: dict[str, int] = field(default_factory=dict)
    bytes_read: int = 0
    bytes_written: int = 0


def layout_folder(store: Store, dataset: str, name: str) -> Store:
    """Return the folder of a layout, committed or not; raise BadInput for names that cannot be folders."""
    return store.child(check_name("dataset", dataset), "layouts", check_name("layout", name))


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
    broken = [*job.raw.left_out, *(one for part in parts for one in part.broken)]
    job.check_broken(broken)
    stored = {place.key: place for part in parts for place in part.places}
    kept = [place for place in job.raw.places if place.key in stored]
    ids = {place.key: number for number, place in enumerate(kept)}
    rows = [place_row(place, stored[place.key].views, ids) for place in kept]
    if not job.raw.is_gallery and not any(
        place.views[row].split == "train" for place in kept for row in stored[place.key].views
    ):
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
                "quality": None if job.options.original else job.images.quality,
                "enlarged": sum(part.enlarged for part in parts),
            },
            broken=[str(one) for one in broken],
            sources_file=sources_file(source for part in parts for source in part.sources),
            tile_metres=job.raw.tile_metres,
        ),
    )
    advance(store, dataset, layout, None)
    clean(folder, layout.shard_names)
    notes = list(job.raw.notes)
    if enlarged := layout.info["images"]["enlarged"]:
        notes.append(f"{enlarged} images are smaller than the stored size and were enlarged")
    if dropped := len(job.raw.places) - layout.n_places:
        notes.append(f"{dropped} places were left out because their tile is broken")
    said = tuple(layout.info["broken"]), tuple(notes)
    return ShardReport(layout, False, len(parts) - resumed, resumed, *said, {}, *moved_bytes(job, parts))


def moved_bytes(job: ShardJob, parts: Sequence[StoredPart]) -> tuple[int, int]:
    """Return the bytes of raw files that a job has read, the sample of them twice, and those of its shards."""
    read = job.sampled_bytes + sum(source.bytes for part in parts for source in part.sources)
    return read, sum(part.size for part in parts)


def place_row(place: Place, views_stored: Sequence[int], ids: dict[str, int]) -> dict[str, object]:
    """Return a row of ``places.parquet``, with those views that are stored and without semi-positives that are not."""
    views = [
        {
            "name": view_name(number),
            "split": view.split,
            "source": view.image.path,
            "north": view.north,
            "east": view.east,
            "semi_positives": sorted(ids[key] for key in view.semi_positives if key in ids),
        }
        for number, view in enumerate(place.views[row] for row in views_stored)
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


def clean(folder: Store, shards: Sequence[str]) -> None:
    """Remove, by name, what jobs have written here that is no part of the layout.

    These are the sidecars, the last shards of an earlier plan that had more of them, and uploads that were killed.

    Args:
        folder: the layout's folder.
        shards: names of the layout's own shards.
    """
    try:
        claimed = claimed_shards(folder.read_json(JOB))
    except NotFound:
        claimed = 0
    named = [*shards, *shard_names(claimed)[len(shards) :]]
    sidecars = {sidecar_name(shard) for shard in named} & {info.path for info in folder.list("parts")}
    folder.delete_all([*sidecars, *named[len(shards) :]])
    folder.delete_all([JOB])  # last: the others' names follow from it
    folder.delete_unfinished([*object_names(named), JOB])
