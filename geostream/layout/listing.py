"""Find the data sets of a store and the committed layouts of a data set, by listing folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geostream.errors import BadInput, LayoutNotCommitted
from geostream.layout.files import layouts_folder, read_info
from geostream.store import NAME, Store, check_name


def list_datasets(store: Store) -> list[str]:
    """Return the names of the data sets in the store that have at least one committed layout."""
    return [name for name in store.folders() if NAME.fullmatch(name) and list_layouts(store, name)]


def the_dataset(store: Store, dataset: str | None) -> str:
    """Return the name of a data set, or that of the only one in the store.

    Args:
        store: The root of the store.
        dataset: The name, which is not looked up; None for the only one.

    Raises:
        BadInput: ``dataset`` is not a valid name; or it is None, and there is none or more than one.
    """
    if dataset is not None:
        return check_name("dataset", dataset)
    found = list_datasets(store)
    if len(found) != 1:
        have = ", ".join(found) or "none; shard one first: geostream shard vigor RAW STORE"
        raise BadInput(f"{store.url}: say which dataset with --dataset (there: {have})")
    return found[0]


def list_layouts(store: Store, dataset: str) -> list[str]:
    """Return the names of a data set's committed layouts, oldest generation first.

    Args:
        store: The root of the store.
        dataset: The data set's name.

    Raises:
        StoreError: A ``layout.json`` is damaged.
    """
    infos = layout_infos(store, dataset)
    return sorted(infos, key=lambda name: (infos[name]["generation"], name))


def layout_infos(store: Store, dataset: str) -> dict[str, dict[str, Any]]:
    """Read ``layout.json`` of each committed layout of a data set.

    Args:
        store: The root of the store.
        dataset: The data set's name.

    Returns:
        Its content by the layout's name.

    Raises:
        StoreError: A ``layout.json`` is damaged.
    """
    folder = layouts_folder(store, dataset)
    infos = {}
    for name in filter(NAME.fullmatch, folder.folders()):  # folders with other names are no layouts
        try:
            infos[name] = read_info(folder.child(name))
        except LayoutNotCommitted:
            continue  # for a reader it does not exist
    return infos


def newest(infos: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the newest generations of some layouts: one, unless they are of several lines.

    Args:
        infos: ``layout.json`` of each layout by its name.

    Returns:
        Names, sorted: for each table of places those of the highest generation, without those that another layout
        was made from.
    """
    last: dict[str, int] = {}  # generation of each table of places
    for info in infos.values():
        places = info["index"]["places.parquet"]
        last[places] = max(last.get(places, 0), info["generation"])
    before = {one for info in infos.values() for one in (info["parent"], *info["source"].get("ancestors", ()))}
    return sorted(
        name
        for name, info in infos.items()
        if info["generation"] == last[info["index"]["places.parquet"]] and info["id"] not in before
    )
