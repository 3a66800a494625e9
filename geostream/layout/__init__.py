"""What lies on the store: the schema of a layout, its files, and a :class:`Layout` to read them by."""

from geostream.layout.layout import Layout, commit_layout, layout_infos, list_datasets, list_layouts, open_layout
from geostream.layout.schema import MEMBERS, PLACES, Coordinates, Protocol

__all__ = [
    "MEMBERS",
    "PLACES",
    "Coordinates",
    "Layout",
    "Protocol",
    "commit_layout",
    "layout_infos",
    "list_datasets",
    "list_layouts",
    "open_layout",
]
