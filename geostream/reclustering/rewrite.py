"""Rewrite a layout as its next generation: the same members, bit for bit, in other shards.

Only a layout that joins other data sets gets new headers: there, members are renamed from the keys of their own data
sets, which two data sets may have in common, to those of the joined layout.

A task makes one new shard. It reads the members' ranges from the old shards, several at a time and adjacent members in
one read, checks each member against the index, and uploads the whole shard (in parts if it is large). So every byte of
a member is read once and written once. A task carries the rows of the index that it needs. It holds its new shard twice
and READS ranges of RANGE_BYTES: 0.4 GB for shards of 128 MiB. The process that hands out the tasks holds the index, 8
bytes a member beside it, and the tasks of TASKS shards (about 100 bytes a member); to commit, the new table of members.

The bytes of the new shards depend only on the order of the places. A folder belongs to one order from its first object
on, ``parts/job.json``, which is written by a conditional put. So a shard that is there is right, a rewrite that was
killed continues with the missing shards, and two at once write the same bytes. Readers of the old generation notice
nothing. ``layout.json`` is the commit.
"""

from __future__ import annotations

import hashlib
import io
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
from geostream.layout.files import GOING, JOB, object_names, read_sources, shard_names
from geostream.layout.layout import MEMBERS_FILE
from geostream.layout.lineage import ancestors, next_name
from geostream.layout.schema import HEADER
from geostream.layout.verify import member_damage
from geostream.progress import track
from geostream.store import NAME, Store

END = bytes(2 * tarfile.BLOCKSIZE)  # end of a tar file
READS = 16  # ranges that a worker reads at a time
RANGE_BYTES = 8 * 2**20  # most bytes of one read, except for a larger member
TASKS = 512  # shards whose tasks are handed out at a time
SIGN_OF_LIFE = 60.0  # seconds between two signs of life in the job file


@dataclass(frozen=True)
class NewShard:
    """A task: write one new shard.

    Attributes:
        name: Name of the shard.
        members: Its members in order: their rows of the old generation's index, the ``key`` of each one's place, and
            what the place is called in the old shard, ``stored_key``.
    """

    name: str
    members: pa.Table


def rewrite(
    store: Store, parent: Layout, shards: Sequence[Int32], source: dict[str, Any], cluster: str | None = None
) -> Layout:
    """Write a layout's places in a new order as its next generation, and commit it.

    If the same order was begun before, this continues it; if it was committed before, nothing is written.

    Args:
        store: The store that holds the dataset.
        parent: The layout to rewrite.
        shards: Ids of each shard's places, in order; every place is in exactly one, but for those that were removed.
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
    index = _MembersOfPlaces(parent)
    sizes = _shard_sizes(parent, shards)
    work = partial(write_shard, root=store.url, dataset=parent.dataset, parent=(parent.name, parent.id), folder=folder)
    try:
        # The folder is listed again before the commit, because somebody may have removed objects meanwhile.
        while todo := _missing(folder, names, sizes):
            for at in range(0, len(todo), TASKS):
                tasks = [NewShard(names[number], index.task(shards[number])) for number in todo[at : at + TASKS]]
                written = run_tasks(cluster, work, tasks, "rewrite-shard")
                _keep_alive(folder, job, track(written, "reclustered shards", len(tasks)))
    finally:
        _shards_of_parent.cache_clear()
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
                sources_file=read_sources(parent.store, parent.info),
                members=index_of(parent, shards),
                shards=list(zip(names, sizes.tolist(), strict=True)),
                source={**source, **(parent.source or {}), "order": order, "ancestors": ancestors(parent.info)},
                images=parent.info["images"],
                broken=parent.info["broken"],
                parent=parent.id,
                tile_metres=parent.tile_metres,
                joined=parent.joined,
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
        while (name := next_name(parent.name, parent.generation, number)) in infos or name in held:
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


def _missing(folder: Store, names: Sequence[str], sizes: Int64) -> list[int]:
    """Return the numbers of the shards that are not in the folder with the right size."""
    there = {info.path: info.size for info in folder.list()}
    return [number for number, name in enumerate(names) if there.get(name) != sizes[number]]


def _clean(folder: Store, shards: Sequence[str]) -> None:
    """Remove the job and the remains of killed uploads, which are not part of the layout."""
    folder.delete_all([JOB])
    folder.delete_unfinished(object_names(shards))


class _MembersOfPlaces:
    """Find the members of places in a layout's index; this holds 8 bytes a member and 8 a place."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        place = layout.members["place"].to_numpy()
        self._by_place = np.argsort(place, kind="stable")
        self._ends = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=layout.n_places))])

    def rows(self, places: Int32) -> Int64:
        """Return the rows of the places' members, in the order of the places; those of a place as on disk."""
        first = self._ends[places]
        counts = self._ends[places.astype(np.int64) + 1] - first
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows: Int64 = self._by_place[np.repeat(first, counts) + within]
        return rows

    def task(self, places: Int32) -> pa.Table:
        """Return what a task has to know of the members of the places."""
        members = self._layout.members.take(self.rows(places))
        keys = self._layout.places["key"].take(members["place"])
        stored = keys
        if self._layout.joined:
            rows = zip(*(column.to_pylist() for column in (keys, members["place"], members["shard"])), strict=True)
            stored = pa.chunked_array([[self._layout.stored_key(*row) for row in rows]], pa.string())
        return members.append_column("key", keys).append_column("stored_key", stored).combine_chunks()


def bytes_of_places(layout: Layout) -> Int64:
    """Return (N,) the bytes that the members of each place take in tar files."""
    weight = np.zeros(layout.n_places, dtype=np.int64)
    for part in layout.index.parts(MEMBERS_FILE, ["place", "size"]):
        np.add.at(weight, part["place"].to_numpy(), tar_bytes(part))
    return weight


def _shard_sizes(parent: Layout, shards: Sequence[Int32]) -> Int64:
    """Return the bytes of each new shard."""
    weight = bytes_of_places(parent)
    return np.array([int(weight[places].sum()) + len(END) for places in shards], dtype=np.int64)


def tar_bytes(members: pa.Table | pa.RecordBatch) -> Int64:
    """Return the bytes that each member takes in a tar file: header, data and padding."""
    size: Int64 = members["size"].to_numpy()
    return HEADER + size + -size % tarfile.BLOCKSIZE


def index_of(parent: Layout, shards: Sequence[Int32]) -> pa.Table:
    """Compute the index of the new generation. It follows from the order alone.

    Args:
        parent: The layout to rewrite.
        shards: Ids of each new shard's places, in order.

    Returns:
        The table of ``members.parquet``.
    """
    index, parts = _MembersOfPlaces(parent), []
    for number, places in enumerate(shards):
        members = parent.members.take(index.rows(places))
        lengths = tar_bytes(members)
        offset = np.cumsum(lengths) - lengths + HEADER
        for column, values in (("shard", np.full(len(offset), number)), ("offset", offset)):
            at = members.schema.get_field_index(column)
            field = members.schema.field(at)
            members = members.set_column(at, field, pa.array(values).cast(field.type))
        parts.append(members)
    return pa.concat_tables(parts).combine_chunks()


@lru_cache(maxsize=1)
def _shards_of_parent(root: str, dataset: str, name: str, layout_id: str) -> tuple[Store, list[str]]:
    """Return the folder of all layouts and the old shards' paths in it; raise StaleArtefact if it was replaced."""
    layout = open_layout(Store.open(root), dataset, name)
    if layout.id != layout_id:
        raise StaleArtefact(f"{layout.store.url}: another layout than when reclustering began; begin again")
    return layout.shards_store, layout.shard_paths


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
    old, names = _shards_of_parent(root, dataset, *parent)
    length = tar_bytes(task.members)
    target = np.cumsum(length) - length
    out = io.BytesIO(bytes(int(length.sum()) + len(END)))
    with ThreadPoolExecutor(READS, thread_name_prefix="geostream-recluster") as pool, out.getbuffer() as buffer:
        copies = [
            pool.submit(_copy, old, names, task.members.take(run), target[run], buffer) for run in _runs(task.members)
        ]
        try:
            for copy in copies:
                copy.result()
        finally:
            pool.shutdown(cancel_futures=True)
    data = out.getvalue()
    folder.write(task.name, data)
    return len(data)


def _runs(members: pa.Table) -> list[Int64]:
    """Group the rows of members that are adjacent in an old shard into reads of up to RANGE_BYTES."""
    shard, offset = (members[name].to_numpy() for name in ("shard", "offset"))
    order = np.lexsort((offset, shard))
    shard, begin = shard[order], offset[order] - HEADER
    end = begin + tar_bytes(members)[order]
    apart = np.flatnonzero((shard[1:] != shard[:-1]) | (begin[1:] != end[:-1])) + 1
    runs = []
    for run in np.split(np.arange(len(order)), apart):
        pieces = np.flatnonzero(np.diff((end[run] - begin[run[0]]) // RANGE_BYTES)) + 1
        runs += [order[piece] for piece in np.split(run, pieces)]
    return runs


def _copy(old: Store, names: Sequence[str], some: pa.Table, target: Int64, buffer: memoryview) -> None:
    """Read adjacent members in one read and copy each into the new shard; raise StoreError if one is damaged.

    Padding is not copied, because in a tar file it is zero.
    """
    members = some.to_pylist()
    shard = names[members[0]["shard"]]
    begin = members[0]["offset"] - HEADER
    data = memoryview(old.read_range(shard, begin, members[-1]["offset"] + members[-1]["size"] - begin))
    for member, to in zip(members, target.tolist(), strict=True):
        at = member["offset"] - HEADER - begin
        one = bytes(data[at : at + HEADER + member["size"]])
        name = f"{member['stored_key']}.{member['member']}"
        if wrong := member_damage(one, name, member["size"], member["crc32c"]):
            raise StoreError(
                f"{old.url}/{shard}: {name!r}: {wrong}; the next generation is not committed. "
                "Look for all that is damaged with: geostream verify; restore it, and run again to go on"
            )
        if member["stored_key"] != member["key"]:
            one = _renamed(one[:HEADER], f"{member['key']}.{member['member']}") + one[HEADER:]
        buffer[to : to + len(one)] = one


def _renamed(header: bytes, name: str) -> bytes:
    """Return a member's header with another name."""
    info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    info.name = name
    return info.tobuf(tarfile.USTAR_FORMAT)
