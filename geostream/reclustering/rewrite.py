"""Rewrite a layout as its next generation: the same members, bit for bit, in other shards.

A task makes one new shard. It reads the members' ranges from the old shards, several at a time and adjacent members in
one read, checks each member against the index, and uploads the whole shard (in parts if it is large). So every byte of
a member is read once and written once, and a worker holds one new shard and a few ranges in memory.

The bytes of the new shards depend only on the order of the places. A folder belongs to one order from its first object
on, ``parts/job.json``, which is written by a conditional put. So a shard that is there is right, a rewrite that was
killed continues with the missing shards, and two at once write the same bytes. Readers of the old generation notice
nothing. ``layout.json`` is the commit.
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
from geostream.layout import Layout, NewLayout, commit_layout, layout_infos, open_layout
from geostream.layout.files import JOB, object_names, shard_names
from geostream.layout.schema import HEADER
from geostream.layout.verify import member_damage
from geostream.planning.spreading import shard_of_rows
from geostream.progress import track
from geostream.store import NAME, Store

GOING = "going.json"  # marks a folder that is being removed: it is not continued, and its name is not used
END = bytes(2 * tarfile.BLOCKSIZE)  # end of a tar file
READS = 16  # ranges that a worker reads at a time
RANGE_BYTES = 8 * 2**20  # most bytes of one read, except for a larger member
SIGN_OF_LIFE = 60.0  # seconds between two signs of life in the job file


@dataclass(frozen=True)
class NewShard:
    """A task: write one new shard.

    Attributes:
        name: Name of the shard.
        places: Ids of its places, in order.
    """

    name: str
    places: Int32


def rewrite(
    store: Store, parent: Layout, shards: Sequence[Int32], source: dict[str, Any], cluster: str | None = None
) -> Layout:
    """Write a layout's places in a new order as its next generation, and commit it.

    If the same order was begun before, this continues it; if it was committed before, nothing is written.

    Args:
        store: The store that holds the dataset.
        parent: The layout to rewrite.
        shards: Ids of each shard's places, in order; every place is in exactly one.
        source: What ``layout.json`` notes as the source, beside the order's hash and the ids of the ancestors.
        cluster: URL of a Dask scheduler whose workers reach the store; None works within this process.

    Returns:
        The new layout.

    Raises:
        StoreError: A member is damaged, or the store cannot be read or written; nothing is committed.
        StaleArtefact: The parent was replaced by another layout meanwhile.
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
        # The folder is listed again before the commit, because somebody may have removed objects meanwhile.
        while todo := _missing(folder, tasks, sizes):
            written = run_tasks(cluster, work, todo, "rewrite-shard")
            _keep_alive(folder, job, track(written, "reclustered shards", len(todo)))
    finally:
        _open_parent.cache_clear()
    places_file = parent.store.read("places.parquet")
    if hashlib.sha256(places_file).hexdigest() != parent.places_id:
        raise StoreError(f"{parent.store.url}: places.parquet: changed after the commit; nothing was committed")
    try:
        layout = commit_layout(
            folder,
            NewLayout(
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
            ),
        )
    except AlreadyExists:  # another process was faster, in the same folder and therefore with the same order
        layout = open_layout(store, parent.dataset, name)
    _clean(folder, names)
    return layout


def order_id(parent: Layout, shards: Sequence[Int32]) -> str:
    """Return a hash of everything that the new generation's bytes depend on.

    Args:
        parent: The layout to rewrite.
        shards: Ids of each new shard's places, in order.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(parent.id.encode())
    for places in shards:
        digest.update(len(places).to_bytes(8, "little") + places.astype("<i4").tobytes())
    return digest.hexdigest()[:16]


def ancestors(info: dict[str, Any]) -> list[str]:
    """Return the ids of the generations before a child of a layout, oldest first, removed ones included.

    Args:
        info: The ``layout.json`` of that layout, whose own id comes last.
    """
    before = [info["parent"]] if info["parent"] else []
    return [*info["source"].get("ancestors", before), info["id"]]


def next_name(parent: Layout, number: int) -> str:
    """Return a name for the next generation of a layout.

    Args:
        parent: The layout.
        number: From 1; each number gives another name, for different orders of the same generation.
    """
    root = parent.name if parent.generation == 0 else re.sub(rf"-g{parent.generation}(-\d+)?$", "", parent.name)
    return f"{root}-g{parent.generation + 1}" + (f"-{number}" if number > 1 else "")


def _claim(store: Store, layouts: Store, parent: Layout, job: dict[str, Any]) -> tuple[str, bool]:
    """Claim a folder for the job; return its name, and whether the layout is already committed there."""
    order = job["order"]
    while True:
        infos = layout_infos(store, parent.dataset)
        for name, info in infos.items():
            if info["source"].get("order") == order:
                return name, True
        names = filter(NAME.fullmatch, layouts.folders())  # other folders are not layouts
        held = {name: layouts.child(name) for name in names if name not in infos and layouts.list(name)}
        jobs = {name: _begun(folder) for name, folder in held.items()}
        if any(folder.exists("layout.json") for name, folder in held.items() if not jobs[name]):
            continue  # committed just now, perhaps in this very order
        for name, begun in jobs.items():
            if begun.get("order") == order:
                held[name].write_json(JOB, _alive(job))
                # Who continues writes a sign of life, then looks for the mark of removal. Who removes writes the mark,
                # then looks for a sign of life. So at least one of them sees the other.
                if not held[name].exists(GOING):
                    return name, False
        number = 1
        while (name := next_name(parent, number)) in infos or name in held:
            number += 1
        with suppress(AlreadyExists):  # another process was faster: look again, it may be this very order
            layouts.child(name).write_json(JOB, _alive(job), if_absent=True)
            return name, False


def _begun(folder: Store) -> dict[str, Any]:
    """Return the job of an uncommitted folder; empty if it has none."""
    try:
        job: dict[str, Any] = folder.read_json(JOB)
    except NotFound:
        return {}
    return job


def _alive(job: dict[str, Any]) -> dict[str, Any]:
    """Return the job with the current time as its sign of life."""
    return job | {"alive": datetime.now(UTC).isoformat(timespec="seconds")}


def _keep_alive(folder: Store, job: dict[str, Any], results: Iterator[Any]) -> None:
    """Take all results, and write a sign of life into the folder about every SIGN_OF_LIFE seconds."""
    said = time.monotonic()
    for _ in results:
        if time.monotonic() - said > SIGN_OF_LIFE:
            folder.write_json(JOB, _alive(job))
            said = time.monotonic()


def _missing(folder: Store, tasks: Sequence[NewShard], sizes: Int64) -> list[NewShard]:
    """Return the tasks whose shards are not in the folder with the right size."""
    there = {info.path: info.size for info in folder.list()}
    return [task for task, size in zip(tasks, sizes, strict=True) if there.get(task.name) != size]


def _clean(folder: Store, shards: Sequence[str]) -> None:
    """Remove the job and the remains of killed uploads, which are not part of the layout."""
    folder.delete_all([JOB])
    folder.delete_unfinished(object_names(shards))


def _rows_of(layout: Layout, places: Int32) -> Int64:
    """Return the rows in ``members`` of the places, in the order of the places; those of a place as on disk."""
    place = layout.members["place"].to_numpy()
    by_place = np.argsort(place, kind="stable")
    first = np.searchsorted(place[by_place], places)
    counts = np.searchsorted(place[by_place], places, side="right") - first
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    rows: Int64 = by_place[np.repeat(first, counts) + within]
    return rows


def tar_bytes(members: pa.Table) -> Int64:
    """Return the bytes that each member takes in a tar file: header, data and padding."""
    size: Int64 = members["size"].to_numpy()
    return HEADER + size + -size % tarfile.BLOCKSIZE


def index_of(parent: Layout, shards: Sequence[Int32]) -> tuple[pa.Table, Int64]:
    """Compute the index of the new generation before any shard is written.

    Args:
        parent: The layout to rewrite.
        shards: Ids of each new shard's places, in order.

    Returns:
        The table of ``members.parquet``, and the bytes of each shard.
    """
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
    """Open the old generation once for all tasks of this process; raise StaleArtefact if it was replaced."""
    layout = open_layout(Store.open(root), dataset, name)
    if layout.id != layout_id:
        raise StaleArtefact(f"{layout.store.url}: another layout than when reclustering began; begin again")
    return layout


def write_shard(task: NewShard, *, root: str, dataset: str, parent: tuple[str, str], folder: Store) -> int:
    """Make one new shard and upload it; this runs as a Dask task.

    Args:
        task: The shard to write.
        root: URL of the store.
        dataset: Name of the dataset.
        parent: Name and id of the old generation.
        folder: The folder of the new generation.

    Returns:
        Size of the shard in bytes.

    Raises:
        StoreError: A member is damaged, or the store cannot be read or written.
        StaleArtefact: The old generation was replaced by another layout.
    """
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
    """Group the positions in ``rows`` whose members are adjacent in an old shard into reads of up to RANGE_BYTES."""
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
    """Read adjacent members in one read and copy each into the new shard; raise StoreError if one is damaged.

    Padding is not copied, because in a tar file it is zero.
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
