"""Rewrites a layout as its next generation: the same members, bit for bit, in other shards.

A task makes one new shard: it reads the members' ranges from the old shards, several at a time and neighbours at once,
compares each with the index, and uploads the shard whole (multipart where it is large). So every byte of a member is
read once and written once, and a worker holds one new shard and a few ranges. Nothing but the order of places decides
the new shards' bytes, and a folder belongs to one order from its first object on (``parts/job.json``, a conditional
put). So a shard that is there is right, a run that was killed goes on with what is missing, and two at once write the
same. Readers of the old generation see nothing of it; ``layout.json`` is the commit.
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa

from geostream.arrays import Int32, Int64
from geostream.dask import run_tasks
from geostream.errors import AlreadyExists, NotFound, StaleArtefact, StoreError
from geostream.layout import Layout, commit_layout, layout_infos, open_layout
from geostream.layout.files import JOB, object_names, shard_names
from geostream.layout.schema import HEADER
from geostream.layout.verify import member_damage
from geostream.planning.spreading import shard_of_rows
from geostream.progress import track
from geostream.store import NAME, Store

GOING = "going.json"  # in a folder that is being removed: neither to be gone on with, nor its name to be taken
END = bytes(2 * tarfile.BLOCKSIZE)
READS = 16  # ranges that a worker reads at a time
RANGE_BYTES = 8 * 2**20  # of one read, at most, but for a larger member
SIGN_OF_LIFE = 60.0  # seconds between two


@dataclass(frozen=True)
class NewShard:
    """A task: the shard ``name``, of these places (ids) in this order."""

    name: str
    places: Int32


def rewrite(
    store: Store, parent: Layout, shards: Sequence[Int32], source: dict[str, Any], cluster: str | None = None
) -> Layout:
    """Write the places ``shards`` (ids, shard by shard, every place once) as a new generation, and commit it.

    Goes on where the same order was begun before, and finds it where it was committed. ``source``: for ``layout.json``,
    beside the order's hash and the ancestors' ids. ``cluster``: URL of a Dask scheduler whose workers reach the store;
    None starts one within this process. Raises StoreError, and commits nothing, for a damaged member.
    """
    order = order_id(parent, shards)
    layouts = store.child(parent.dataset, "layouts")
    names = shard_names(len(shards))
    job = {"order": order, "parent": parent.id, "shards": len(shards)}
    name, found = _claim(store, layouts, parent, job)
    folder = layouts.child(name)
    if found:
        _clean(folder, names)
        return open_layout(store, parent.dataset, name)
    tasks = [NewShard(new, places) for new, places in zip(names, shards, strict=True)]
    members, sizes = index_of(parent, shards)
    work = partial(write_shard, root=store.url, dataset=parent.dataset, parent=(parent.name, parent.id), folder=folder)
    try:
        # Looked at again before the commit: what a listing showed may be gone, where someone tidied up meanwhile.
        while todo := _missing(folder, tasks, sizes):
            _keep_alive(folder, job, track(run_tasks(cluster, work, todo), "reclustered shards", len(todo)))
    finally:
        _open_parent.cache_clear()
    places_file = parent.store.read("places.parquet")
    if hashlib.sha256(places_file).hexdigest() != parent.places_id:
        raise StoreError(f"{parent.store.url}: places.parquet: changed after the commit; nothing was committed")
    try:
        layout = commit_layout(
            folder,
            dataset=parent.dataset,
            name=name,
            generation=parent.generation + 1,
            coordinates=parent.coordinates,
            protocols=parent.protocols,
            places=parent.places,
            places_file=places_file,
            members=members,
            shards=[(task.name, int(size)) for task, size in zip(tasks, sizes, strict=True)],
            source={**source, "order": order, "ancestors": ancestors(parent.info)},
            images=parent.info["images"],
            broken=parent.info["broken"],
            parent=parent.id,
        )
    except AlreadyExists:  # another process was faster, in the same folder and so with the same order
        layout = open_layout(store, parent.dataset, name)
    _clean(folder, names)
    return layout


def order_id(parent: Layout, shards: Sequence[Int32]) -> str:
    """Hash of all that the new generation's bytes depend on."""
    digest = hashlib.sha256(parent.id.encode())
    for places in shards:
        digest.update(len(places).to_bytes(8, "little") + places.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


def ancestors(info: dict[str, Any]) -> list[str]:
    """Ids of the generations behind a child of the layout ``info``, oldest first: also of those long removed."""
    before = [info["parent"]] if info["parent"] else []
    return [*info["source"].get("ancestors", before), info["id"]]


def next_name(parent: Layout, number: int) -> str:
    """Name of the next generation; ``number``: of those that want it, from 1."""
    root = parent.name if parent.generation == 0 else re.sub(rf"-g{parent.generation}(-\d+)?$", "", parent.name)
    return f"{root}-g{parent.generation + 1}" + (f"-{number}" if number > 1 else "")


def _claim(store: Store, layouts: Store, parent: Layout, job: dict[str, Any]) -> tuple[str, bool]:
    """The name of the folder that is this job's, from now on; and whether the layout is committed there."""
    order = job["order"]
    while True:
        infos = layout_infos(store, parent.dataset)
        for name, info in infos.items():
            if info["source"].get("order") == order:
                return name, True
        names = filter(NAME.fullmatch, layouts.folders())  # others are no layouts of ours
        held = {name: layouts.child(name) for name in names if name not in infos and layouts.list(name)}
        jobs = {name: _begun(folder) for name, folder in held.items()}
        if any(folder.exists("layout.json") for name, folder in held.items() if not jobs[name]):
            continue  # committed just now, perhaps in this very order
        for name, begun in jobs.items():
            if begun.get("order") == order:
                held[name].write_json(JOB, _alive(job))
                # Asked after the sign of life, and whoever removes looks for that after the mark: one sees the other.
                if not held[name].exists(GOING):
                    return name, False
        number = 1
        while (name := next_name(parent, number)) in infos or name in held:
            number += 1
        with suppress(AlreadyExists):  # another process was faster: look again, it may be this very order
            layouts.child(name).write_json(JOB, _alive(job), if_absent=True)
            return name, False


def _begun(folder: Store) -> dict[str, Any]:
    """What a folder without a commit says of itself."""
    try:
        job: dict[str, Any] = folder.read_json(JOB)
    except NotFound:
        return {}
    return job


def _alive(job: dict[str, Any]) -> dict[str, Any]:
    """``parts/job.json`` of a job that is at work now."""
    return job | {"alive": datetime.now(UTC).isoformat(timespec="seconds")}


def _keep_alive(folder: Store, job: dict[str, Any], results: Iterator[Any]) -> None:
    """Take all results, and say now and then in the folder that somebody is at work."""
    said = time.monotonic()
    for _ in results:
        if time.monotonic() - said > SIGN_OF_LIFE:
            folder.write_json(JOB, _alive(job))
            said = time.monotonic()


def _missing(folder: Store, tasks: Sequence[NewShard], sizes: Int64) -> list[NewShard]:
    there = {info.path: info.size for info in folder.list()}
    return [task for task, size in zip(tasks, sizes, strict=True) if there.get(task.name) != size]


def _clean(folder: Store, shards: Sequence[str]) -> None:
    """Remove what is no part of the layout: the job, and what killed uploads of its shards left."""
    folder.delete_all([JOB])
    folder.delete_unfinished(object_names(shards))


def _rows_of(layout: Layout, places: Int32) -> Int64:
    """Rows in ``members`` of the places, in their order; of a place in the order on disk."""
    place = layout.members["place"].to_numpy()
    by_place = np.argsort(place, kind="stable")
    first = np.searchsorted(place[by_place], places)
    counts = np.searchsorted(place[by_place], places, side="right") - first
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    rows: Int64 = by_place[np.repeat(first, counts) + within]
    return rows


def tar_bytes(members: pa.Table) -> Int64:
    """Bytes that each of the members takes in a tar: header, data, padding."""
    size: Int64 = members["size"].to_numpy()
    return HEADER + size + -size % tarfile.BLOCKSIZE


def index_of(parent: Layout, shards: Sequence[Int32]) -> tuple[pa.Table, Int64]:
    """``members.parquet`` of the new generation, and the bytes of each of its shards: known before one is written."""
    rows = _rows_of(parent, np.concatenate(list(shards)))
    members = parent.members.take(rows)
    shard, lengths = shard_of_rows(shards)[members["place"].to_numpy()], tar_bytes(members)
    sizes = np.bincount(shard, weights=lengths, minlength=len(shards)).astype(np.int64)
    offset = np.cumsum(lengths) - lengths - (np.cumsum(sizes) - sizes)[shard] + HEADER
    for column, values in (("shard", shard), ("offset", offset)):
        at = members.schema.get_field_index(column)
        members = members.set_column(at, members.schema.field(at), pa.array(values))
    return members, sizes + len(END)


@lru_cache(maxsize=1)
def _open_parent(root: str, dataset: str, name: str, layout_id: str) -> Layout:
    """The old generation, once for all tasks of this process."""
    layout = open_layout(Store.open(root), dataset, name)
    if layout.id != layout_id:
        raise StaleArtefact(f"{layout.store.url}: another layout than when reclustering began; begin again")
    return layout


def write_shard(task: NewShard, *, root: str, dataset: str, parent: tuple[str, str], folder: Store) -> int:
    """A Dask task: make one new shard and upload it. Returns its bytes. Raises StoreError for a damaged member."""
    layout = _open_parent(root, dataset, *parent)
    rows = _rows_of(layout, task.places)
    length = tar_bytes(layout.members)[rows]
    target = np.cumsum(length) - length
    out = io.BytesIO(bytes(int(length.sum()) + len(END)))
    with ThreadPoolExecutor(READS, thread_name_prefix="geostream-recluster") as pool, out.getbuffer() as buffer:
        copies = [pool.submit(_copy, layout, rows[run], target[run], buffer) for run in _runs(layout, rows)]
        try:
            for copy in copies:
                copy.result()
        finally:
            pool.shutdown(cancel_futures=True)
    data = out.getvalue()
    folder.write(task.name, data)
    return len(data)


def _runs(layout: Layout, rows: Int64) -> list[Int64]:
    """Places in ``rows`` of members that lie next to each other in an old shard, read at once up to RANGE_BYTES."""
    shard, offset = (layout.members[name].to_numpy()[rows] for name in ("shard", "offset"))
    order = np.lexsort((offset, shard))
    shard, begin = shard[order], offset[order] - HEADER
    end = begin + tar_bytes(layout.members)[rows][order]
    apart = np.flatnonzero((shard[1:] != shard[:-1]) | (begin[1:] != end[:-1])) + 1
    runs = []
    for run in np.split(np.arange(len(order)), apart):
        pieces = np.flatnonzero(np.diff((end[run] - begin[run[0]]) // RANGE_BYTES)) + 1
        runs += [order[piece] for piece in np.split(run, pieces)]
    return runs


def _copy(layout: Layout, rows: Int64, target: Int64, buffer: memoryview) -> None:
    """Read neighbouring members at once and put each to its place in the new shard; raise StoreError for a damaged one.

    Padding is not copied but zero, as it is in a tar that is whole.
    """
    members = layout.members.take(rows).to_pylist()
    shard = layout.shard_names[members[0]["shard"]]
    begin = members[0]["offset"] - HEADER
    data = memoryview(layout.store.read_range(shard, begin, members[-1]["offset"] + members[-1]["size"] - begin))
    for member, to in zip(members, target.tolist(), strict=True):
        at = member["offset"] - HEADER - begin
        one = bytes(data[at : at + HEADER + member["size"]])
        name = f"{layout.keys[member['place']]}.{member['member']}"
        if wrong := member_damage(one, name, member["size"], member["crc32c"]):
            raise StoreError(
                f"{layout.store.url}/{shard}: {name!r}: {wrong}; the next generation is not committed. "
                "Look for all that is damaged with: geostream verify; restore it, and run again to go on"
            )
        buffer[to : to + len(one)] = one
