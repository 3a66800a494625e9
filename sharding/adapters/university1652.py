"""Read University-1652's raw folder: a building's satellite image with its drone views, or its street views.

::

    train/satellite/<building>/*         one image each
    train/drone/<building>/*             54 views each; street: a few, or none
    test/gallery_satellite/<building>/*  951 buildings: those that are asked for, and 250 distractors
    test/query_drone/<building>/*        the views that ask, of 701 buildings
    test/gallery_drone/<building>/*      the same views again, and those of the distractors
    test/query_satellite/…               the same images as in gallery_satellite: not read

The same with ``street`` in the place of ``drone``. Source of the layout: Zheng, Wei, Yang, University-1652, ACM
Multimedia 2020 (code: University1652-Baseline). Sizes and protocol (both directions) as Sample4Geo has them.

A query view is a candidate, too, when views are searched: gallery_drone is read for what query_drone lacks, and an
image of the same name counts as the same. There are no coordinates and no lists: what lies in a building's folder
belongs to it. Training and test are areas of their own, so that a number may be in both.

Some buildings are there several times under different numbers. With ``join_alike``, training buildings whose tiles look
nearly the same are semi-positives of each other, and never share a batch. For this all training tiles are opened. The
test set is left as it is, so the authors' protocol is, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from geostream.errors import BadInput
from sharding.adapters.raw_files import find_root, list_folder, listed_stamp, located, readable_name
from sharding.alike import alike
from sharding.places import IMAGE_SUFFIX, Place, RawDataset, RawImage, View, assign_keys
from sharding.raw_path import RawPath

SIZE = (384, 384)
VIEWS = ("drone", "street")
Buildings = dict[str, list[RawImage]]  # each building's images, sorted by name


def read_places(raw: RawPath, *, views: str = "drone", join_alike: float | None = None) -> RawDataset:
    """Read a University-1652 folder.

    Args:
        raw: the folder.
        views: which views it is read with: "drone" or "street".
        join_alike: correlation of two training tiles' thumbnails, above 0 and up to 1, from which they count as one
            building; None: every number is a building of its own.

    Returns:
        Its places. Files that are no images, and buildings without a satellite image, are left out and noted.

    Raises:
        BadInput: ``views`` is neither of the two, ``join_alike`` no correlation, or a name is not UTF-8.
        MissingRaw: a folder is missing.
    """
    raw = find_root(raw, "University-1652's train and test", ("train/satellite", "test/gallery_satellite"))
    if views not in VIEWS:
        raise BadInput(f"views {views!r}: University-1652 has {' and '.join(VIEWS)}")
    if join_alike is not None and not 0 < join_alike <= 1:
        raise BadInput(f"join_alike {join_alike:g}: choose a correlation above 0 and up to 1, such as 0.95")
    strays: list[str] = []
    bare: list[str] = []
    several: list[str] = []
    places: list[Place] = []
    for area, gallery, searched in (
        ("train", "satellite", {"train": views}),
        ("test", "gallery_satellite", {"test": f"query_{views}", "gallery": f"gallery_{views}"}),
    ):
        tiles = _buildings(raw, f"{area}/{gallery}", strays)
        shown = {split: _buildings(raw, f"{area}/{folder}", strays) for split, folder in searched.items()}
        keys = assign_keys((area, building) for building in tiles)
        bare += [
            f"{area}/{name}"
            for name in sorted({*tiles, *(one for of in shown.values() for one in of)})
            if not tiles.get(name)
        ]
        for name, images in tiles.items():
            if images:
                several += [f"{area}/{name}"] * (len(images) > 1)
                places.append(Place(keys[area, name], area, (area,), images[0], views=_views(shown, name)))
    joined: list[str] = []
    if join_alike is not None:
        places, joined = _joined(raw, places, join_alike)
    return RawDataset(
        adapter="university1652",
        root=raw,
        options={"views": views} | ({} if join_alike is None else {"join_alike": join_alike}),
        coordinates="none",
        tile_size=SIZE,
        view_size=SIZE,
        places=tuple(places),
        notes=(
            *_note(strays, "files or folders are no .jpg or .png of a building and were passed over"),
            *_note(bare, "buildings have no satellite image and were left out, with their views"),
            *_note(several, "buildings have several satellite images, of which the first by name was taken"),
            *_note(joined, "training buildings look like another one and never share a batch with it"),
        ),
        protocols=("both-ways",),
    )


def _buildings(raw: RawPath, folder: str, strays: list[str]) -> Buildings:
    """Return all buildings in ``folder``; add what is neither building nor image to ``strays``."""
    found: Buildings = {}
    base = located(raw, folder)
    for building in list_folder(base):
        inside = f"{base.relative_to(raw).as_posix()}/{readable_name(building)}"
        if not building.is_dir():
            strays.append(inside)
            continue
        found[building.name] = []
        for entry in list_folder(raw / inside):
            path = f"{inside}/{readable_name(entry)}"
            if IMAGE_SUFFIX.search(entry.name) and entry.is_file():
                found[building.name].append(RawImage(path, inside, stamp=listed_stamp(entry)))
            else:
                strays.append(path)
    return found


def _views(shown: dict[str, Buildings], building: str) -> tuple[View, ...]:
    """Return the views of a building; of those with one name, that of the first split."""
    views: dict[str, View] = {}
    for split, buildings in shown.items():
        earlier = set(views)
        for image in buildings.get(building, []):
            name = image.path.rpartition("/")[2]
            if name not in earlier:
                views[name] = View(image, split)
    return tuple(views.values())


def _joined(raw: RawPath, places: list[Place], least: float) -> tuple[list[Place], list[str]]:
    """Return the places, look-alikes in training as semi-positives of each other, and the keys of these."""
    training = [place for place in places if place.splits == ("train",)]
    lists = alike([raw / place.tile.path for place in training], least)
    others = {place.key: tuple(training[other].key for other in lists.row(row)) for row, place in enumerate(training)}
    joined = [
        replace(place, views=tuple(replace(view, semi_positives=others[place.key]) for view in place.views))
        if others.get(place.key)
        else place
        for place in places
    ]
    return joined, sorted(key for key, alikes in others.items() if alikes)


def _note(names: Sequence[str], what: str) -> list[str]:
    return [f"{len(names)} {what}: {', '.join(names[:3])}{', …' if len(names) > 3 else ''}"] if names else []
