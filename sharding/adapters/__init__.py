"""Register the adapters: each reads one data set's raw folder and returns it as places.

To add a data set, write one module beside this one, with a function ``read_places(raw, *, options…)`` that returns a
:class:`~sharding.places.RawDataset`, and register it in ``ADAPTERS``. ``raw`` is a folder on a disk or on a store
(:class:`~sharding.raw_path.RawPath`). The function reads lists and folders by :mod:`sharding.adapters.raw_files`,
gives each tile a key by :func:`~sharding.places.assign_keys`, and opens no image unless an option asks for it. The
parameters behind ``raw`` are the adapter's options; a new one becomes an option of ``geostream shard`` in
:mod:`sharding.cli`. An example is ``tests/sharding/adapters/test_new_adapter.py``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from geostream.errors import BadInput, MissingRaw
from sharding.adapters import cv_cities, cvact, cvusa, gta_uav, photos, table, university1652, vigor
from sharding.places import RawDataset, sorted_places
from sharding.raw_path import open_raw


class Adapter(NamedTuple):
    """Name what reads one data set, and where it is to be had.

    Attributes:
        read: the adapter's ``read_places``. It may return its places in any order.
        source: URL where the data set is to be had, for messages about missing files; "": it is the user's own.
        grows: its options that may be others when more is appended to a layout.
        terms: on which terms, as its authors say.
        holds: what it holds.
        files: what its files are called.
    """

    read: Callable[..., RawDataset]
    source: str
    grows: tuple[str, ...] = ()
    terms: str = ""
    holds: str = ""
    files: str = ""


ADAPTERS = {
    "vigor": Adapter(
        vigor.read_places,
        "https://github.com/Jeff-Zilence/VIGOR",
        ("train_cities", "test_cities"),
        terms="On request, by a form; for academic research only, not to be passed on.",
        holds="105,214 street panoramas and 90,618 half-overlapping tiles of four cities of the USA",
        files="<City>/panorama, <City>/satellite, splits/<City>/*.txt",
    ),
    "cvusa": Adapter(
        cvusa.read_places,
        "https://mvrl.cse.wustl.edu/datasets/cvusa",
        terms="On request; the page says on which terms.",
        holds="44,416 pairs of street panorama and tile, all over the USA",
        files="splits/*-19zl.csv, bingmap/19, streetview/panos, split_locations/all.csv",
    ),
    "cvact": Adapter(
        cvact.read_places,
        "https://github.com/Liumouliu/OriCNN",
        terms="No terms are given; panoramas and tiles are Google's.",
        holds="44,416 pairs of street panorama and tile in Canberra, and 92,802 more to test on",
        files="ACT_data.mat, ANU_data_small, ANU_data_test",
    ),
    "university1652": Adapter(
        university1652.read_places,
        "https://github.com/layumi/University1652-Baseline",
        terms="On request, by the form Request.md.",
        holds="Drone, street and satellite images of 1,652 buildings",
        files="train/{satellite,drone,street}, test/{query,gallery}_*",
    ),
    "cv-cities": Adapter(
        cv_cities.read_places,
        "https://huggingface.co/datasets/gaoshuang98/CV-Cities",
        ("train_cities", "test_cities"),
        terms="To be downloaded by anybody. The code is under BSD 3-Clause; the page says what holds for the images.",
        holds="223,736 pairs of street panorama and tile in sixteen cities of six continents",
        files="<city>/img_info.csv, <city>/pano_images, <city>/sat_images",
    ),
    "gta-uav": Adapter(
        gta_uav.read_places,
        "https://huggingface.co/datasets/Yux1ang/GTA-UAV-LR",
        terms="To be downloaded by anybody; Apache 2.0.",
        holds="33,763 drone pictures and 14,640 tiles of a game's country, at four zoom levels",
        files="drone/images, satellite, {cross,same}-area-drone2sate-{train,test}.json",
    ),
    "table": Adapter(
        table.read_places,
        "",
        terms="Your own.",
        holds="Pairs that a table names by path or URL",
        files="A .csv, .tsv, .parquet or .geojson file with the columns query and tile",
    ),
    "photos": Adapter(
        photos.read_places,
        "",
        terms="Your own, and those of the imagery, which the layout keeps.",
        holds="Photos with coordinates, and imagery that tiles are cut from",
        files="A folder of photos (EXIF or a table), a GeoTIFF, XYZ template or STAC search, a region as GeoJSON",
    ),
}


def read_places(adapter: str, raw: str | Path, **options: Any) -> RawDataset:
    """Read a raw folder as places.

    Args:
        adapter: the data set's name in ``ADAPTERS``.
        raw: the folder, as it was downloaded; on a local disk, or the URL of a store's folder.
        options: the adapter's own, see its ``read_places``.

    Returns:
        The data set, with its places by area and key, and each place's views by split and path.

    Raises:
        BadInput: the adapter or an option is unknown, or a list in the folder is malformed.
        MissingRaw: a folder or list is missing; the message says where the data set is to be had.
    """
    if adapter not in ADAPTERS:
        raise BadInput(f"no adapter for {adapter!r}; there is one for {', '.join(ADAPTERS)}")
    read, source = ADAPTERS[adapter].read, ADAPTERS[adapter].source
    known = [name for name in inspect.signature(read).parameters if name != "raw"]
    if unknown := sorted(set(options) - set(known)):
        raise BadInput(f"{adapter} has no option {', '.join(unknown)}; it has {', '.join(known) or 'none'}")
    try:
        dataset = read(open_raw(raw), **options)
    except MissingRaw as error:
        if not source:
            raise
        raise MissingRaw(f"{error} The data set is to be had at {source}") from error
    return replace(dataset, places=sorted_places(dataset.places))
