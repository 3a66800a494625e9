"""Read and commit layouts: what lies on the store of a data set, its schema, its files and :class:`Layout`."""

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
