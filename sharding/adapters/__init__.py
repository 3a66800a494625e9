"""Adapters: each reads one dataset's raw folder and returns its places (:mod:`sharding.places`)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from geostream.errors import BadInput, MissingRaw
from sharding.adapters import cvact, cvusa, university1652, vigor
from sharding.places import SOURCES, RawDataset

ADAPTERS: dict[str, Callable[..., RawDataset]] = {
    "vigor": vigor.read_places,
    "cvusa": cvusa.read_places,
    "cvact": cvact.read_places,
    "university1652": university1652.read_places,
}


def read_places(adapter: str, raw: str | Path, **options: Any) -> RawDataset:
    """The places of the raw folder ``raw``, read by ``adapter`` with its own options (see its ``read_places``).

    Raises BadInput for an unknown adapter or option, and whatever is wrong with the folder.
    """
    if adapter not in ADAPTERS:
        raise BadInput(f"no adapter for {adapter!r}; there is one for {', '.join(ADAPTERS)}")
    read = ADAPTERS[adapter]
    known = [name for name in inspect.signature(read).parameters if name != "raw"]
    if unknown := sorted(set(options) - set(known)):
        raise BadInput(f"{adapter} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    try:
        return read(Path(raw), **options)
    except MissingRaw as error:
        raise MissingRaw(f"{error} The data set is to be had at {SOURCES[adapter]}") from error
