"""Name the generations of a layout, and tell which descend from which, by the content of their ``layout.json``."""

from __future__ import annotations

import re
from typing import Any


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
