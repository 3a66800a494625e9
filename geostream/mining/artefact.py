"""Zarr groups on the store that are either committed or absent: what embeddings and neighbour graphs have in common.

The mark is an attribute of the group, set last. It lies in the group's own ``zarr.json``, one object, so it appears at
once or not at all. A group names the layout it was made from and that layout's table of places. It speaks of places,
not of where they lie, so every generation of the layout may read it; whoever has other places is refused.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import zarr

from geostream.errors import NotFound, StaleArtefact
from geostream.layout import Layout
from geostream.store import Store


def new_group(run: Store, name: str, layout: Layout) -> zarr.Group:
    """An empty group at ``name``, made from ``layout``. What was there is gone, its mark
    first, so that no half of it reads as committed."""
    run.delete(f"{name}/zarr.json")
    run.delete_prefix(name)
    group = zarr.open_group(run.zarr(name), mode="w-", zarr_format=3)
    group.attrs.update({"layout": layout.id, "places": layout.places_id})
    return group


def open_committed(run: Store, name: str, layout: Layout | None, again: str) -> zarr.Group:
    """The group at ``name``. ``again``: how a user makes it anew.

    Raises NotFound where there is none or it was never finished, StaleArtefact where it was made from other places
    than those of ``layout`` (None: any).
    """
    where = f"{run.url}/{name}"
    if not run.exists(f"{name}/zarr.json"):
        raise NotFound(f"{where}: not there; {again}")
    group = zarr.open_group(run.zarr(name, read_only=True), mode="r")
    if group.attrs.get("committed") is not True:
        raise NotFound(f"{where}: not committed, its writing was cut off; {again}")
    if layout is not None and group.attrs.get("places") != layout.places_id:
        raise StaleArtefact(f"{where}: made from other places than those of layout {layout.name}; {again}")
    return group


def array_of(group: zarr.Group, name: str) -> npt.NDArray[Any]:
    """A whole array of the group."""
    return np.asarray(cast("zarr.Array[Any]", group[name])[:])


def commit(group: zarr.Group) -> None:
    """Set the mark: from now on the group can be read."""
    group.attrs["committed"] = True
