"""Commit, open and verify layouts: the sets of shards, each with an index, that hold a data set on the store."""

from geostream.layout.layout import (
    Layout,
    NewLayout,
    commit_layout,
    layout_infos,
    list_datasets,
    list_layouts,
    open_layout,
)
from geostream.layout.schema import MEMBERS, PLACES, Coordinates, Protocol

__all__ = [
    "MEMBERS",
    "PLACES",
    "Coordinates",
    "Layout",
    "NewLayout",
    "Protocol",
    "commit_layout",
    "layout_infos",
    "list_datasets",
    "list_layouts",
    "open_layout",
]
