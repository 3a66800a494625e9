"""Append to a layout what its raw folder has more: new and changed places in new shards, beside those that are there.

The new layout is a child of the newest one of its line. It names old shards where they lie, and only new and changed
places are read, encoded and written. Places keep their ids; new ones follow. A changed place is written again as a
whole; what the raw folder has of it unchanged is taken over from the old shard. The old bytes stay, for readers of the
old layout. A later reclustering leaves them behind.

An append that was killed goes on in the same folder where the changes are the same. Of two different ones that are made
from one layout at the same time, the first to commit wins.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from joblib import cpu_count

from geostream.arrays import distinct
from geostream.errors import AlreadyExists, BadInput, NotFound
from geostream.layout import (
    MEMBERS,
    PLACES,
    Layout,
    NewLayout,
    advance,
    commit_layout,
    current_layout,
    layout_infos,
    open_layout,
)
from geostream.layout.files import JOB, object_names
from geostream.layout.lineage import ancestors, next_name
from geostream.layout.listing import newest
from geostream.store import Store
from sharding.adapters import ADAPTERS
from sharding.commit import ShardReport, clean, layout_folder, moved_bytes, place_row
from sharding.growth import Growth, Rules, find_growth
from sharding.job import QUALITY, SAMPLE, Images, ShardJob, ShardOptions, cut_job
from sharding.places import KeptImage, Place, RawDataset, Size
from sharding.raw_reader import RawReader
from sharding.sources import sources_file
from sharding.writer import StoredPart, write_shards

OPTIONAL = ("join_alike",)  # options that a layout notes only where they were given


def newest_layout(store: Store, dataset: str, name: str) -> Layout:
    """Return what is appended to: the current layout where it descends from a given one, else its newest descendant.

    Args:
        store: the root of the store.
        dataset: the data set's name in it.
        name: the layout's name; it is committed.

    Raises:
        BadInput: there are several, which hold different places.
    """
    named = open_layout(store, dataset, name)
    infos = {named.name: named.info, **layout_infos(store, dataset)}
    line = {one: info for one, info in infos.items() if named.id in ancestors(info)}
    current = current_layout(store, dataset)
    if current is not None and current.layout in line and line[current.layout]["id"] == current.id:
        return open_layout(store, dataset, current.layout)
    heads = newest(line)
    if len({infos[one]["index"]["places.parquet"] for one in heads}) > 1:
        raise BadInput(
            f"{store.url}/{dataset}: {' and '.join(heads)} descend from {name} and hold different places; say "
            "which one to append to with --layout"
        )
    return open_layout(store, dataset, heads[0])


def append(
    raw: RawDataset, parent: Layout, store: Store, options: ShardOptions | None, rules: Rules, workers: int | None
) -> ShardReport:
    """Append to a layout what a raw folder has more, or find that it has nothing.

    Args:
        raw: the data set, as it is now.
        parent: the newest layout of its line.
        store: the root of the store.
        options: how images are stored; None, and what is None in it, is taken over from the layout.
        rules: what may be taken away and extended.
        workers: processes that encode; None: one a core; 1: this one.

    Raises:
        BadInput: the layout was made by another adapter or with other options, too many images are broken, or another
            append has been committed meanwhile.
        StoreError: the store cannot be reached, or refuses.
    """
    _tidy(parent, store)
    children = _children(parent, store)
    job, growth = plan_append(raw, parent, options, rules, workers)
    if growth.is_nothing:
        return _nothing(raw, growth)
    for name, fingerprint in children.items():
        if fingerprint == job.fingerprint:  # committed before, but another layout is the current one
            made = open_layout(store, parent.dataset, name)
            _tidy(made, store)
            return replace(
                _nothing(raw, growth), layout=made, notes=(*raw.notes, *growth.notes, *_advance(store, made))
            )
    job.check_broken(_new_broken(growth))
    name = _claim(job, parent, store)
    folder = layout_folder(store, parent.dataset, name)
    parts, resumed = write_shards(job, folder, workers)
    if set(_children(parent, store)) - {*children, name}:
        _discard(job, folder)
        raise BadInput(
            f"{folder.url}: another layout has been made of {parent.name} meanwhile; run the same command again, to "
            "append to that one. Nothing was committed"
        )
    return _commit(job, growth, raw, folder, store, (parts, resumed))


def _children(parent: Layout, store: Store) -> dict[str, str]:
    """Return the fingerprint of each layout that was made of one, by name; "" of one by a reclustering."""
    infos = layout_infos(store, parent.dataset)
    return {name: info["source"].get("fingerprint", "") for name, info in infos.items() if info["parent"] == parent.id}


def _advance(store: Store, made: Layout) -> list[str]:
    """Make an appended layout the current one, unless another one is; return a note where that is so."""
    if advance(store, made.dataset, made, made.info["parent"]):
        return []
    return [f"another layout is the current one; this one becomes so by: geostream layouts use {store.url} {made.name}"]


def plan_append(
    raw: RawDataset, parent: Layout, options: ShardOptions | None, rules: Rules, workers: int | None
) -> tuple[ShardJob, Growth]:
    """Compare a raw folder with a layout, and plan the shards of what is new; write nothing.

    Arguments and errors are those of :func:`append`.
    """
    options, images = _as_stored(options or ShardOptions(), raw, parent)
    growth = find_growth(raw, parent, images, rules, workers or cpu_count())
    written = tuple(growth.places[number] for number in sorted(growth.written))
    sampled = min(SAMPLE, max(1, len(written) // 16))  # so that little is read twice
    written_raw = replace(raw, places=written, left_out=())
    job = cut_job(written_raw, options, images, growth.fingerprint, raw.n_listed, sampled)
    return replace(job, parent=parent.id), growth


def _as_stored(options: ShardOptions, raw: RawDataset, parent: Layout) -> tuple[ShardOptions, Images]:
    """Return the options with what the layout stores images as; raise BadInput where something else is asked for."""
    source = parent.info["source"].get("first", parent.info["source"])  # a reclustered layout has its first one's there
    there = f"{parent.store.url}: the layout"
    if source.get("adapter") != raw.adapter:
        raise BadInput(
            f"{there} was made by the adapter {source.get('adapter')}, not {raw.adapter}; choose another name"
        )
    grows = ADAPTERS[raw.adapter].grows if raw.adapter in ADAPTERS else ()
    as_noted = json.loads(json.dumps(raw.options))  # a tuple becomes a list
    fixed = {name: value for name, value in as_noted.items() if name not in grows}
    for name, value in fixed.items():
        if (had := source["options"].get(name)) != value:
            raise BadInput(f"{there} was made with {name} {had}, not {value}; choose another name")
    if missing := sorted(set(source["options"]) & set(OPTIONAL) - set(fixed)):
        raise BadInput(f"{there} was made with {missing[0]} {source['options'][missing[0]]}; say so again")
    if parent.coordinates != raw.coordinates:
        raise BadInput(
            f"{there} has positions of kind {parent.coordinates}, not {raw.coordinates}; choose another name"
        )
    stored: dict[str, Any] = parent.info["images"]
    original = stored["quality"] is None
    asked: dict[str, object] = {
        "original": options.original or None,
        "tile_size": options.tile_size and list(options.tile_size),
        "view_size": options.view_size and list(options.view_size),
        "quality": None if original else options.quality,
    }
    for name, value in asked.items():
        has = original if name == "original" else stored[name]
        if value is not None and value != has:
            raise BadInput(
                f"{there} stores images with {name} {has}, not {value}; leave it out, or choose another name"
            )
    tile_size, view_size = (_size(stored[name]) for name in ("tile_size", "view_size"))
    images = Images(RawReader.of(raw.root), tile_size, view_size, stored["quality"] or QUALITY, parent.shards_store)
    return replace(options, original=original, tile_size=None, view_size=None, quality=stored["quality"]), images


def _size(size: Sequence[int] | None) -> Size | None:
    return None if size is None else (size[0], size[1])


def _new_broken(growth: Growth) -> list[Any]:
    """Return the broken images that the layout before does not list already."""
    had = {text.split(": ", 2)[1] for text in growth.parent.info["broken"] if text.count(": ") > 1}
    return [one for one in growth.broken if one.path not in had]


def _nothing(raw: RawDataset, growth: Growth) -> ShardReport:
    broken = tuple(map(str, growth.broken))
    notes, read = (*raw.notes, *growth.notes), growth.compared_bytes
    return ShardReport(growth.parent, True, 0, 0, broken, notes, dict(growth.counts), read)


def _tidy(layout: Layout, store: Store) -> None:
    """Finish a sharding or append that was killed right behind its commit."""
    try:
        claim = layout.store.read_json(JOB)
    except NotFound:
        return
    if "order" not in claim:  # else it is a reclustering's, which tidies up itself
        _advance(store, layout)
        clean(layout.store, _own(layout))


def _own(layout: Layout) -> list[str]:
    return [name for name, borrowed in zip(layout.shard_names, layout.borrowed, strict=True) if not borrowed]


def _claim(job: ShardJob, parent: Layout, store: Store) -> str:
    """Return the name of the new layout, whose folder is this job's: where it was begun, or the first free one."""
    number = 1
    while True:
        name = next_name(parent.name, parent.generation, number)
        folder = layout_folder(store, parent.dataset, name)
        if not folder.list():
            try:
                folder.write_json(JOB, job.claim, if_absent=True)
            except AlreadyExists:
                continue  # claimed just now, perhaps by this very job
            return name
        try:
            if not folder.exists("layout.json") and folder.read_json(JOB).get("fingerprint") == job.fingerprint:
                return name
        except NotFound:
            pass  # somebody else's objects
        number += 1


def _commit(
    job: ShardJob,
    growth: Growth,
    raw: RawDataset,
    folder: Store,
    store: Store,
    made: tuple[Sequence[StoredPart], int],
) -> ShardReport:
    """Index the written shards beside the borrowed ones, and commit them as a layout."""
    parent, (parts, resumed) = growth.parent, made
    broken = [*growth.broken, *(one for part in parts for one in part.broken)]
    job.check_broken([*_new_broken(growth), *(one for part in parts for one in part.broken)])
    stored = {place.key: place for part in parts for place in part.places}
    if not (stored or growth.counts["removed places"] or growth.rows_changed):  # all that is new is broken
        _discard(job, folder)
        return replace(_nothing(raw, growth), broken=tuple(map(str, broken)))
    keep = np.zeros(parent.n_places, dtype=bool)  # places whose members stay where they are
    kept, ids, views = list[Place](), dict[str, int](), list[Sequence[int]]()
    for number, place in enumerate(growth.places):
        is_new = number >= parent.n_places
        if number in growth.written and place.key in stored:
            shown: Sequence[int] = stored[place.key].views
        elif is_new:
            continue  # its tile is broken
        else:
            if number in growth.written:  # its tile has broken just now
                place = growth.stored[number].place
            shown = range(len(place.views))
            keep[number] = not growth.stored[number].removed and number not in growth.removed
        if is_new or keep[number] or place.key in stored:
            ids[place.key] = len(kept)
        kept.append(place)
        views.append(shown)
    rows = [place_row(place, shown, ids) for place, shown in zip(kept, views, strict=True)]
    old = parent.members.filter(pa.array(keep[parent.members["place"].to_numpy()]))
    borrowed = distinct(old["shard"].to_numpy())
    at = old.schema.get_field_index("shard")
    numbers = np.searchsorted(borrowed, old["shard"].to_numpy()).astype(np.int32)
    old = old.set_column(at, old.schema.field(at), pa.array(numbers))
    new = [
        {"place": ids[place.key], "shard": len(borrowed) + number, "member": member.name, **member._asdict()}
        for number, part in enumerate(parts)
        for place in part.places
        for member in place.members
    ]
    paths, sizes = parent.shard_paths, parent.shard_sizes.tolist()
    sources = [*growth.sources.values(), *(source for part in parts for source in part.sources)]
    layout = commit_layout(
        folder,
        NewLayout(
            dataset=parent.dataset,
            name=folder.url.rpartition("/")[2],
            generation=parent.generation + 1,
            coordinates=parent.coordinates,
            protocols=parent.protocols,
            places=pa.Table.from_pylist(rows, schema=PLACES),
            members=pa.concat_tables([old, pa.Table.from_pylist(new, schema=MEMBERS)]).combine_chunks(),
            shards=[*((paths[n], sizes[n]) for n in borrowed.tolist()), *((part.name, part.size) for part in parts)],
            source={
                **joined_source(parent.source, job.source),
                "made_from": parent.name,
                "ancestors": ancestors(parent.info),
                "counts": {name: count for name, count in growth.counts.items() if count},
            },
            images=parent.info["images"]
            | {"enlarged": parent.info["images"]["enlarged"] + sum(part.enlarged for part in parts)},
            broken=[str(one) for one in broken],
            parent=parent.id,
            sources_file=sources_file(sources),
            tile_metres=parent.tile_metres,
        ),
    )
    notes = (*raw.notes, *growth.notes, *_advance(store, layout))
    clean(folder, [part.name for part in parts])
    read, wrote = moved_bytes(job, parts)
    said = tuple(map(str, broken)), notes, dict(growth.counts)
    return ShardReport(layout, False, len(parts) - resumed, resumed, *said, growth.compared_bytes + read, wrote)


def joined_source(before: dict[str, Any] | None, source: dict[str, Any]) -> dict[str, Any]:
    """Return what an appended layout is made from, with the licences and attributions of the tiles that it borrows.

    Args:
        before: where the tiles of the layout before come from, of :attr:`Layout.source`.
        source: what the append is made from.
    """
    joined = dict(source)
    for name, had in (before or {}).items():
        now = source.get(name)
        joined[name] = now if not had or (now and had in now) else had if not now or now in had else f"{had}; {now}"
    return joined


def _discard(job: ShardJob, folder: Store) -> None:
    """Remove what the job has written in a folder that is not committed."""
    folder.delete_all(object_names([part.name for part in job.parts]))
    folder.delete_all([JOB])


def read_again(job: ShardJob) -> int:
    """Return how many raw images the job reads to encode them; the others of its places are taken over."""
    return sum(not isinstance(image, KeptImage) for place in job.raw.places for image in place.images())
