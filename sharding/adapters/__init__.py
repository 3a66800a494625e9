"""Register the adapters: each reads one data set's raw folder and returns it as places.

To add a data set, write one module beside this one, with a function ``read_places(raw, *, options…)`` that returns a
:class:`~sharding.places.RawDataset`, and register it in ``ADAPTERS``. The function reads lists and folders by
:mod:`sharding.adapters.raw_files`, gives each tile a key by :func:`~sharding.places.assign_keys`, and opens no
image. The parameters behind ``raw`` are the adapter's options; a new one becomes an option of ``geostream shard`` in
:mod:`sharding.cli`. An example is ``tests/sharding/adapters/test_new_adapter.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from geostream.errors import BadInput, MissingRaw
from sharding.adapters import cvact, cvusa, photos, university1652, vigor
from sharding.places import RawDataset, sorted_places


class Adapter(NamedTuple):
    """Name what reads one data set, and where it is to be had.

    Attributes:
        read: the adapter's ``read_places``. It may return its places in any order.
        source: URL where the data set is to be had, for messages about missing files.
        grows: its options that may be others when more is appended to a layout.
    """

    read: Callable[..., RawDataset]
    source: str
    grows: tuple[str, ...] = ()


ADAPTERS = {
    "vigor": Adapter(vigor.read_places, "https://github.com/Jeff-Zilence/VIGOR", ("train_cities", "test_cities")),
    "cvusa": Adapter(cvusa.read_places, "https://mvrl.cse.wustl.edu/datasets/cvusa"),
    "cvact": Adapter(cvact.read_places, "https://github.com/Liumouliu/OriCNN"),
    "university1652": Adapter(university1652.read_places, "https://github.com/layumi/University1652-Baseline"),
    "photos": Adapter(photos.read_places, "docs/how-to/own-imagery.md: the photos and the imagery are your own"),
}


def read_places(adapter: str, raw: str | Path, **options: Any) -> RawDataset:
    """Read a raw folder as places.

    Args:
        adapter: the data set's name in ``ADAPTERS``.
        raw: the folder, as it was downloaded.
        options: the adapter's own, see its ``read_places``.

    Returns:
        The data set, with its places by area and key, and each place's views by split and path.

    Raises:
        BadInput: the adapter or an option is unknown, or a list in the folder is malformed.
        MissingRaw: a folder or list is missing; the message says where the data set is to be had.
    """
    if adapter not in ADAPTERS:
        raise BadInput(f"no adapter for {adapter!r}; there is one for {', '.join(ADAPTERS)}")
    read, source, _ = ADAPTERS[adapter]
    known = [name for name in inspect.signature(read).parameters if name != "raw"]
    if unknown := sorted(set(options) - set(known)):
        raise BadInput(f"{adapter} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    try:
        dataset = read(Path(raw), **options)
    except MissingRaw as error:
        raise MissingRaw(f"{error} The data set is to be had at {source}") from error
    return replace(dataset, places=sorted_places(dataset.places))
