"""Write and read Zarr groups that are either committed or absent; embeddings and neighbour graphs are such groups.

A group is committed by an attribute that is set last. It lies in the group's own ``zarr.json``, one object, so it
appears at once or not at all. A group names the layout it was made from and the hash of its table of places. Every
generation of that layout may read it; a layout with other places may not.
When a group is made anew, its objects are removed by the names that its arrays' metadata give; other objects stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr

from geostream.errors import NotFound, StaleArtefact, StoreError
from geostream.layout import Layout
from geostream.store import Store

SCRATCH = "scratch"  # folder within a group's, for what tasks hand on to others while it is made
MADE = f"{SCRATCH}/made.json"  # how many objects of each kind lie there


def new_group(run: Store, name: str, layout: Layout, arrays: Sequence[str]) -> zarr.Group:
    """Make an empty group, and remove one that was there before.

    The old group's mark is removed first, so that no half of it reads as committed.

    Args:
        run: the run's folder.
        name: the group's path in it.
        layout: what the group is made from.
        arrays: names of the arrays that it is to hold.

    Raises:
        StoreError: the metadata of an old array is damaged.
    """
    run.delete(f"{name}/zarr.json")
    for array in arrays:
        if run.exists(f"{name}/{array}/zarr.json"):
            run.delete_all(f"{name}/{key}" for key in _chunk_keys(run, name, array))
            run.delete_all([f"{name}/{array}/zarr.json"])  # last: the chunks' names follow from it
    drop_scratch(run, name)
    group = zarr.create_group(run.zarr(name), zarr_format=3)
    group.attrs.update({"layout": layout.id, "places": layout.places_id})
    return group


def _chunk_keys(run: Store, name: str, array: str) -> Iterator[str]:
    """Yield the name within the group of each object that an array's data may be in."""
    try:
        old = zarr.open_array(run.zarr(f"{name}/{array}", read_only=True), mode="r")
        blocks = [ceil(size / of) for size, of in zip(old.shape, old.shards or old.chunks, strict=True)]
        encode = cast("Any", old.metadata).encode_chunk_key
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{run.url}/{name}/{array}/zarr.json: damaged ({error}); delete {name} by hand") from error
    for at in np.ndindex(*blocks):
        yield f"{array}/{encode(at)}"


def scratch_object(name: str, kind: str, number: int) -> str:
    """Return the path within the run of an object that tasks use while the group ``name`` is made."""
    return f"{name}/{SCRATCH}/{kind}-{number:05d}"


def claim_scratch(run: Store, name: str, **counts: int) -> None:
    """Write down, before they are made, how many scratch objects of each kind the group ``name`` will have."""
    run.write_json(f"{name}/{MADE}", _scratch(run, name) | counts)


def drop_scratch(run: Store, name: str) -> None:
    """Remove the scratch objects of the group ``name`` that were written down."""
    if not (counts := _scratch(run, name)):
        return
    run.delete_all(scratch_object(name, kind, number) for kind, count in counts.items() for number in range(count))
    run.delete_all([f"{name}/{MADE}"])


def _scratch(run: Store, name: str) -> dict[str, int]:
    try:
        counts: dict[str, int] = run.read_json(f"{name}/{MADE}")
    except NotFound:
        return {}
    return counts


def open_committed(run: Store, name: str, layout: Layout | None, again: str) -> zarr.Group:
    """Open a committed group for reading.

    Args:
        run: the run's folder.
        name: the group's path in it.
        layout: whose places it must be made from; None: any.
        again: how a user makes it anew, for messages.

    Raises:
        NotFound: there is none, or it was never finished.
        StaleArtefact: it was made from other places.
    """
    where = f"{run.url}/{name}"
    if not run.exists(f"{name}/zarr.json"):
        raise NotFound(f"{where}: not there; {again}")
    with being_replaced(where, again):
        group = zarr.open_group(run.zarr(name, read_only=True), mode="r")
    if group.attrs.get("committed") is not True:
        raise NotFound(f"{where}: not committed, its writing was cut off; {again}")
    if layout is not None and group.attrs.get("places") != layout.places_id:
        raise StaleArtefact(f"{where}: made from other places than those of layout {layout.name}; {again}")
    return group


@contextmanager
def being_replaced(where: str, again: str) -> Iterator[None]:
    """Raise NotFound where another process makes the group anew while it is read: its arrays go one by one."""
    try:
        yield
    except (KeyError, FileNotFoundError) as error:
        raise NotFound(f"{where}: being made anew by another process; {again}") from error


def array_of(group: zarr.Group, name: str) -> npt.NDArray[Any]:
    """Read a whole array of the group into memory."""
    return np.asarray(cast("zarr.Array[Any]", group[name])[:])


def commit(group: zarr.Group) -> None:
    """Mark the group as committed: from now on it can be read."""
    group.attrs["committed"] = True
