"""Write and read Zarr groups that are either committed or absent; embeddings and neighbour graphs are such groups.

A group is committed by an attribute that is set last. The attribute is in the group's ``zarr.json``, one object, so it
is set at once or not at all. A group records the layout that it was made from and the hash of its table of places.
Every generation of that layout may use it; a layout with other places may not. When a group is made again, the old
objects are removed by the names that follow from its arrays' metadata. Other objects stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr

from geostream.arrays import Int64
from geostream.errors import NotFound, StaleArtefact, StoreError
from geostream.layout import Layout
from geostream.store import Store

Apply = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
PIECES = 16  # in which some rows of an array are read
SCRATCH = "scratch"  # folder within a group, for objects that tasks hand on to others while the group is made
MADE = f"{SCRATCH}/made.json"  # how many objects of each kind are in it


def new_group(run: Store, name: str, layout: Layout, arrays: Sequence[str]) -> zarr.Group:
    """Make an empty group, and remove an older one with the same name.

    Args:
        run: The run's folder.
        name: The group's path in it.
        layout: The layout that the group is made from.
        arrays: Names of the arrays that the older group may have.

    Raises:
        StoreError: The metadata of an old array is damaged.
    """
    remove_group(run, name, arrays)
    group = zarr.create_group(run.zarr(name), zarr_format=3)
    group.attrs.update({"layout": layout.id, "places": layout.places_id})
    return group


def remove_group(run: Store, name: str, arrays: Sequence[str]) -> None:
    """Remove a group, if there is one.

    The group's mark is removed first, so that a half-removed group does not count as committed.

    Args:
        run: The run's folder.
        name: The group's path in it.
        arrays: Names of the arrays that it may have.

    Raises:
        StoreError: The metadata of an array is damaged.
    """
    run.delete(f"{name}/zarr.json")
    for array in arrays:
        if run.exists(f"{name}/{array}/zarr.json"):
            run.delete_all(f"{name}/{key}" for key in _chunk_keys(run, name, array))
            run.delete_all([f"{name}/{array}/zarr.json"])  # last, because the chunks' names follow from it
    drop_scratch(run, name)
    run.delete_all([f"{name}/zarr.json"])  # in a local store the empty folder goes, too


def _chunk_keys(run: Store, name: str, array: str) -> Iterator[str]:
    """Yield the name, within the group, of each object that may hold data of an array."""
    try:
        old = zarr.open_array(run.zarr(f"{name}/{array}", read_only=True), mode="r")
        blocks = [ceil(size / of) for size, of in zip(old.shape, old.shards or old.chunks, strict=True)]
        encode = cast("Any", old.metadata).encode_chunk_key
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{run.url}/{name}/{array}/zarr.json: damaged ({error}); delete {name} by hand") from error
    for at in np.ndindex(*blocks):
        yield f"{array}/{encode(at)}"


def scratch_object(name: str, kind: str, number: int) -> str:
    """Return the path of an object that tasks use while a group is made.

    Args:
        name: The group's path in the run.
        kind: The kind of object.
        number: Its number among those of its kind.
    """
    return f"{name}/{SCRATCH}/{kind}-{number:05d}"


def claim_scratch(run: Store, name: str, **counts: int) -> None:
    """Record how many scratch objects of each kind will be made for a group, so that they can be removed.

    Args:
        run: The run's folder.
        name: The group's path in it.
        **counts: How many objects there will be, by kind.
    """
    run.write_json(f"{name}/{MADE}", _scratch(run, name) | counts)


def drop_scratch(run: Store, name: str, *kinds: str) -> None:
    """Remove the scratch objects that were recorded for a group.

    Args:
        run: The run's folder.
        name: The group's path in it.
        *kinds: The kinds of objects to remove; none are named for all.
    """
    counts = _scratch(run, name)
    if gone := {kind: count for kind, count in counts.items() if not kinds or kind in kinds}:
        run.delete_all(scratch_object(name, kind, number) for kind, count in gone.items() for number in range(count))
        if left := {kind: count for kind, count in counts.items() if kind not in gone}:
            run.write_json(f"{name}/{MADE}", left)
        else:
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
        run: The run's folder.
        name: The group's path in it.
        layout: The layout whose places it must be made from; None allows any.
        again: How a user makes it again, for errors.

    Raises:
        NotFound: There is no such group, or it was never finished.
        StaleArtefact: It was made from other places.
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


def open_arrays(run: Store, name: str, *arrays: str) -> list[zarr.Array[Any]]:
    """Open some arrays of a committed group, in a task that is part of work on it.

    Args:
        run: The run's folder.
        name: The group's path in it.
        *arrays: Names of the arrays.

    Raises:
        NotFound: They are made anew by another process.
    """
    with being_replaced(f"{run.url}/{name}", "wait for it, and run this again"):
        opened = zarr.open_group(run.zarr(name, read_only=True), mode="r")
        return [cast("zarr.Array[Any]", opened[array]) for array in arrays]


def pick_by_tasks(run: Store, name: str, array: str, rows: Int64, apply: Apply = map) -> npt.NDArray[Any]:
    """Read some rows of a committed group's array. Each costs the reading of a whole chunk, so tasks share the work.

    Args:
        run: The run's folder.
        name: The group's path in it.
        array: Name of the array.
        rows: (n,) row numbers, sorted and distinct.
        apply: Applies a function to tasks; the results may come in any order.

    Returns:
        (n, …) rows.

    Raises:
        NotFound: The group is made anew by another process.
    """
    pieces = list(enumerate(np.array_split(rows, 1 if apply is map else PIECES)))
    ends = np.cumsum([len(some) for _, some in pieces])
    found: npt.NDArray[Any] | None = None
    for number, values in apply(partial(pick_piece, run, name, array), pieces):
        if found is None:  # filled piece by piece, because joining them takes twice the memory
            found = np.empty((len(rows), *values.shape[1:]), dtype=values.dtype)
        found[ends[number] - len(values) : ends[number]] = values
    assert found is not None
    return found


def pick_piece(run: Store, name: str, array: str, piece: tuple[int, Int64]) -> tuple[int, npt.NDArray[Any]]:
    """Run as a task: read some rows of an array; return the number of the piece, and the rows."""
    [stored] = open_arrays(run, name, array)
    return piece[0], np.asarray(stored.get_orthogonal_selection((piece[1], slice(None))))


@contextmanager
def being_replaced(where: str, again: str) -> Iterator[None]:
    """Raise NotFound within the context if arrays of a group vanish, because another process makes it again.

    Args:
        where: The group's URL, for the error.
        again: How a user makes it again, for the error.
    """
    try:
        yield
    except (KeyError, FileNotFoundError) as error:
        raise NotFound(f"{where}: being made anew by another process; {again}") from error


def array_of(group: zarr.Group, name: str) -> npt.NDArray[Any]:
    """Read a whole array of the group into memory."""
    return np.asarray(cast("zarr.Array[Any]", group[name])[:])


def commit(group: zarr.Group) -> None:
    """Mark the group as committed, so that it can be opened."""
    group.attrs["committed"] = True
