"""Say which layout of a data set is the current one: the one that is opened where none is named.

``<store>/<dataset>/layouts/current.json`` names it. Sharding, appending and reclustering move it after their commit,
from the layout that they began with to the one they made. A layout that comes from elsewhere does not become current by
itself; a person chooses it with ``geostream layouts use``. The file is only replaced conditionally, so of two that
move it at once only one does.

Stores from before this file was written have none. Their current layout is the newest generation, if there is only one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from geostream.errors import NotFound, StoreError
from geostream.layout.files import layouts_folder
from geostream.layout.listing import layout_infos, newest
from geostream.layout.tags import find_layout
from geostream.store import Store, check_name

if TYPE_CHECKING:
    from geostream.layout.layout import Layout

FILE = "current.json"
FORMAT = 1


@dataclass(frozen=True)
class Current:
    """The current layout of a data set.

    Attributes:
        layout: Its name.
        id: Its id.
    """

    layout: str
    id: str


def current_layout(store: Store, dataset: str) -> Current | None:
    """Read which layout is current.

    Args:
        store: The root of the store.
        dataset: The data set's name.

    Returns:
        What ``current.json`` says, although that layout may be gone; None where there is no such file.

    Raises:
        StoreError: The file cannot be read, or is damaged.
    """
    folder = layouts_folder(store, dataset)
    try:
        return _read(folder, folder.read_json(FILE))
    except NotFound:
        return None


def current_or_newest(store: Store, dataset: str, infos: dict[str, dict[str, Any]]) -> Current | None:
    """Return the current layout; where there is no ``current.json``, the newest generation if there is only one.

    Args:
        store: The root of the store.
        dataset: The data set's name.
        infos: ``layout.json`` of each committed layout.
    """
    return current_layout(store, dataset) or _newest(infos)


def use_layout(store: Store, dataset: str, name: str) -> Current:
    """Make a layout the current one, whichever was it before.

    Args:
        store: The root of the store.
        dataset: The data set's name.
        name: Name or tag of the layout.

    Returns:
        What ``current.json`` says now.

    Raises:
        LayoutNotCommitted: There is no such layout.
    """
    _, info = find_layout(store, dataset, name)
    chosen = Current(info["layout"], info["id"])
    layouts_folder(store, dataset).write_json(FILE, _said(chosen))
    return chosen


def advance(store: Store, dataset: str, layout: Layout, parent_id: str | None) -> bool:
    """Move the current layout to one that was just committed, or was found committed.

    It moves only where nothing is current, or where the current layout is the one that this one was made from. Where
    there is no ``current.json`` yet, the newest generation of the other layouts counts as current. It is then written
    down, so that the new layout beside it does not make it unclear which one is meant.

    Args:
        store: The root of the store.
        dataset: The data set's name.
        layout: The layout that was committed.
        parent_id: Id of the layout that it was made from; None for one that was made from raw data.

    Returns:
        Whether ``layout`` is the current one now.

    Raises:
        StoreError: ``current.json`` cannot be read or written, or is damaged.
    """
    folder, made = layouts_folder(store, dataset), Current(layout.name, layout.id)

    def moved(said: Any) -> Any:
        if said is None:
            infos = layout_infos(store, dataset)
            now = _newest({name: info for name, info in infos.items() if name != made.layout})
        else:
            now = _read(folder, said)
        # One of the same name with another id is gone: its folder holds the new one.
        return _said(made if now is None or now.id == parent_id or now.layout == made.layout else now)

    return _read(folder, folder.update_json(FILE, moved)) == made


def _newest(infos: dict[str, dict[str, Any]]) -> Current | None:
    found = newest(infos)
    return Current(found[0], infos[found[0]]["id"]) if len(found) == 1 else None


def _said(current: Current) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(current)}


def _read(folder: Store, said: Any) -> Current:
    """Return what ``current.json`` says; raise StoreError if it is damaged or of an unknown format."""
    try:
        if said["format"] == FORMAT:
            return Current(check_name("layout", said["layout"]), str(said["id"]))
        wrong = f"format {said['format']}, but this geostream reads format {FORMAT}"
    except (KeyError, TypeError):
        wrong = "damaged"
    raise StoreError(f"{folder.url}/{FILE}: {wrong}; choose a layout with: geostream layouts use STORE NAME")
