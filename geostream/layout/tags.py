"""Give layouts further names, which keep them from being removed: ``<store>/<dataset>/layouts/tags.json``.

A tag can be given wherever a layout's name can. It belongs to one layout until it is taken away.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from geostream.errors import BadInput, LayoutNotCommitted, NotFound, StoreError
from geostream.layout.files import layouts_folder, read_info
from geostream.store import NAME, Store, check_name

if TYPE_CHECKING:
    from geostream.layout.layout import Layout

FILE = "tags.json"
FORMAT = 1
GENERATION = re.compile(r".*-g\d+(-\d+)?")  # names that reclusterings and appends give


class Tagged(NamedTuple):
    """The layout that has a tag: its name and id."""

    layout: str
    id: str


def read_tags(store: Store, dataset: str) -> dict[str, Tagged]:
    """Read the tags of a data set's layouts.

    Args:
        store: The root of the store.
        dataset: The data set's name.

    Returns:
        The layout of each tag; it may be gone.

    Raises:
        StoreError: The file cannot be read, or is damaged.
    """
    folder = layouts_folder(store, dataset)
    try:
        return _read(folder, folder.read_json(FILE))
    except NotFound:
        return {}


def find_layout(store: Store, dataset: str, name: str) -> tuple[Store, dict[str, Any]]:
    """Find a committed layout by its name or by one of its tags.

    Args:
        store: The root of the store.
        dataset: The data set's name.
        name: The name or tag. A layout of this name comes first.

    Returns:
        Its folder and its ``layout.json``.

    Raises:
        LayoutNotCommitted: There is no such layout, or it is gone.
        BadInput: ``dataset`` or ``name`` is no valid name.
        StoreError: ``layout.json`` or the tags are damaged.
    """
    layouts = layouts_folder(store, dataset)
    folder = layouts.child(check_name("layout", name))
    try:
        return folder, read_info(folder)
    except LayoutNotCommitted:
        if (tagged := read_tags(store, dataset).get(name)) is None:
            raise
    folder = layouts.child(tagged.layout)
    with suppress(LayoutNotCommitted):
        if (info := read_info(folder))["id"] == tagged.id:
            return folder, info
    raise LayoutNotCommitted(f"{layouts.url}: layout {tagged.layout}, which had the tag {name!r}, is gone")


def tag_layout(store: Store, layout: Layout, tag: str) -> None:
    """Give a layout a tag.

    Args:
        store: The root of the store.
        layout: The layout.
        tag: The tag; the layout may have it already.

    Raises:
        BadInput: It is no valid name, is or could become a layout's name, or belongs to another layout.
        StoreError: The tags cannot be read or written.
    """
    folder = layouts_folder(store, layout.dataset)
    if GENERATION.fullmatch(check_name("tag", tag)):
        raise BadInput(f"tag {tag!r}: a generation may get this name; choose another tag")
    if tag in folder.folders():
        raise BadInput(f"tag {tag!r}: {folder.url}/{tag} is a layout's folder; choose another tag")

    def added(said: Any) -> Any:
        tags, own = _read(folder, said), Tagged(layout.name, layout.id)
        if tags.get(tag, own) != own:
            raise BadInput(
                f"tag {tag!r}: layout {tags[tag].layout} has it; take it away first: geostream layouts untag"
            )
        return _said(tags | {tag: own})

    folder.update_json(FILE, added)


def untag(store: Store, dataset: str, tag: str) -> str:
    """Take a tag away.

    Args:
        store: The root of the store.
        dataset: The data set's name.
        tag: The tag.

    Returns:
        Name of the layout that had it.

    Raises:
        BadInput: No layout has it.
        StoreError: The tags cannot be read or written.
    """
    folder, had = layouts_folder(store, dataset), list[str]()

    def removed(said: Any) -> Any:
        tags = _read(folder, said)
        if tag not in tags:
            raise BadInput(f"{folder.url}: no layout has the tag {tag!r} (there: {', '.join(sorted(tags)) or 'none'})")
        had[:] = [tags.pop(tag).layout]
        return _said(tags)

    folder.update_json(FILE, removed)
    return had[0]


def _said(tags: dict[str, Tagged]) -> dict[str, Any]:
    return {"format": FORMAT, "tags": {tag: one._asdict() for tag, one in sorted(tags.items())}}


def _read(folder: Store, said: Any) -> dict[str, Tagged]:
    """Return the tags; raise StoreError if the file is damaged or of an unknown format."""
    if said is None:
        return {}
    try:
        if said["format"] == FORMAT:
            tags = {tag: Tagged(str(one["layout"]), str(one["id"])) for tag, one in said["tags"].items()}
            if all(NAME.fullmatch(name) for tag, one in tags.items() for name in (tag, one.layout)):
                return tags
        wrong = f"format {said['format']}, but this geostream reads format {FORMAT}"
    except (KeyError, TypeError, AttributeError):
        wrong = "damaged"
    raise StoreError(f"{folder.url}/{FILE}: {wrong}; correct it, or delete it and tag the layouts again")
