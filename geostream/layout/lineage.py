"""Tell which layouts a layout descends from, and which it joins, by its ``layout.json``; name the next generation."""

from __future__ import annotations

import re
from typing import Any, NamedTuple, cast

from geostream.layout.schema import Coordinates


class Joined(NamedTuple):
    """A layout of another data set, whose places are a part of a joined layout's (:mod:`geostream.layout.join`).

    Attributes:
        dataset: Name of its data set.
        layout: Its name.
        id: Its id.
        prefix: What stands before the keys of its places in the joined layout.
        first: Id of its first place in the joined layout, where its places keep their order.
        places: How many there are.
        coordinates: The kind of their positions.
    """

    dataset: str
    layout: str
    id: str
    prefix: str
    first: int
    places: int
    coordinates: Coordinates


def joined_in(info: dict[str, Any]) -> tuple[Joined, ...]:
    """Return the layouts that a layout joins, in the order of their places; none for a usual one.

    Args:
        info: Its ``layout.json``.
    """
    found, first = list[Joined](), 0
    for one in cast("list[dict[str, Any]]", info.get("joined", [])):
        found.append(Joined(**one, first=first))
        first += one["places"]
    return tuple(found)


def ancestors(info: dict[str, Any]) -> list[str]:
    """Return the ids of the generations before a child of a layout, oldest first, removed ones included.

    Args:
        info: The ``layout.json`` of that layout, whose own id comes last.
    """
    before = [info["parent"]] if info["parent"] else []
    return [*info["source"].get("ancestors", before), info["id"]]


def next_name(name: str, generation: int, number: int) -> str:
    """Return a name for the next generation of a layout: ``base-g1``, or ``base-g1-2`` for the second of them.

    Args:
        name: The layout's name.
        generation: Its generation.
        number: From 1; each number gives another name.
    """
    root = name if generation == 0 else re.sub(rf"-g{generation}(-\d+)?$", "", name)
    return f"{root}-g{generation + 1}" + (f"-{number}" if number > 1 else "")
