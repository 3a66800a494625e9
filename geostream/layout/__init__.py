"""Commit, open and verify layouts: the sets of shards, each with an index, that hold a data set on the store."""

from geostream.layout.current import Current, advance, current_layout, use_layout
from geostream.layout.layout import Layout, NewLayout, commit_layout, open_layout
from geostream.layout.listing import layout_infos, list_datasets, list_layouts
from geostream.layout.schema import MEMBERS, PLACES, Coordinates, Protocol

__all__ = [
    "MEMBERS",
    "PLACES",
    "Coordinates",
    "Current",
    "Layout",
    "NewLayout",
    "Protocol",
    "advance",
    "commit_layout",
    "current_layout",
    "layout_infos",
    "list_datasets",
    "list_layouts",
    "open_layout",
    "use_layout",
]
