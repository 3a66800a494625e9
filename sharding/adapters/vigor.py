"""Read VIGOR's raw folder: panoramas and half-overlapping tiles of four cities.

::

    <City>/panorama/<id>,<lat>,<lon>,.jpg           or  ground/<City>/…       one query view each
    <City>/satellite/satellite_<lat>_<lon>.png      or  satellite/<City>/…    one tile each
    splits/<City>/satellite_list.txt                every tile of the gallery, distractors included
    splits/<City>/pano_label_balanced.txt           all panoramas of a city: the cross-area protocol
    splits/<City>/same_area_balanced_train.txt      half of them each: the same-area protocol
    splits/<City>/same_area_balanced_test.txt

A label line has 13 columns: the panorama, then four times (tile, row offset, column offset): its positive and
three semi-positives, which show it off their centre. Labels corrected by later work (Lentsch et al., SliceMatch,
CVPR 2023, supplement A) end in ``__corrected.txt``, and may lie in ``splits__corrected``: preferred where present.
Source of the layout and the protocols: Zhu, Yang, Chen, VIGOR, CVPR 2021.

Lines that contradict each other are an error that names file and line; repeated lines are read once. Offsets are
checked but not kept: retrieval does not use them.
"""

from __future__ import annotations

from collections.abc import Sequence

from geostream.errors import BadInput, MissingRaw
from sharding.adapters.raw_files import (
    FolderIndex,
    Lines,
    find_root,
    first_located,
    read_lines,
    read_number,
    read_position,
)
from sharding.places import IMAGE_SUFFIX, Place, RawDataset, View, assign_keys, repeats
from sharding.raw_path import RawPath

TILE_SIZE = (384, 384)
VIEW_SIZE = (384, 768)
CITIES = ("Chicago", "NewYork", "SanFrancisco", "Seattle")
# protocol: (train cities, their label file), (test cities, their label file)
PROTOCOLS = {
    "cross-area": (
        (("NewYork", "Seattle"), "pano_label_balanced"),
        (("Chicago", "SanFrancisco"), "pano_label_balanced"),
    ),
    "same-area": ((CITIES, "same_area_balanced_train"), (CITIES, "same_area_balanced_test")),
}
PANORAMA_FOLDERS = ("{city}/panorama", "ground/{city}")
TILE_FOLDERS = ("{city}/satellite", "satellite/{city}")
TILE_LISTS = ("splits/{city}/satellite_list.txt", "splits__corrected/{city}/satellite_list.txt")
LABELS = (
    "splits__corrected/{city}/{labels}__corrected.txt",
    "splits/{city}/{labels}__corrected.txt",
    "splits/{city}/{labels}.txt",
)


def read_places(
    raw: RawPath,
    *,
    protocol: str = "cross-area",
    train_cities: Sequence[str] | None = None,
    test_cities: Sequence[str] | None = None,
) -> RawDataset:
    """Read a VIGOR folder. The gallery of a split is every listed tile of its cities.

    Args:
        raw: the folder.
        protocol: "cross-area" (other cities for training than for testing) or "same-area".
        train_cities: names of the training cities; None: the protocol's.
        test_cities: names of the test cities; None: the protocol's.

    Returns:
        Its places. Missing images are marked, not refused.

    Raises:
        BadInput: a list is malformed, or the cities do not fit the protocol.
        MissingRaw: a folder or list is missing.
    """
    raw = find_root(raw, "VIGOR's cities and splits", ("splits", "splits__corrected"))
    if protocol not in PROTOCOLS:
        raise BadInput(f"protocol {protocol!r}: VIGOR has {' and '.join(PROTOCOLS)}")
    (train_default, train_labels), (test_default, test_labels) = PROTOCOLS[protocol]
    train = sorted(map(_city, set(train_default if train_cities is None else train_cities)))
    test = sorted(map(_city, set(test_default if test_cities is None else test_cities)))
    if train_labels == test_labels and (both := sorted(set(train) & set(test))):
        raise BadInput(f"{', '.join(both)}: for training and test at once; {protocol} wants different cities")
    places: list[Place] = []
    repeated = 0
    for city in sorted({*train, *test}):
        splits = {"train": train_labels} if city in train else {}
        if city in test:
            splits["test"] = test_labels
        of_city, again = _read_city(raw, city, splits)
        places += of_city
        repeated += again
    return RawDataset(
        adapter="vigor",
        root=raw,
        options={"protocol": protocol, "train_cities": train, "test_cities": test},
        coordinates="latlon",
        tile_size=TILE_SIZE,
        view_size=VIEW_SIZE,
        places=tuple(places),
        notes=repeats(repeated),
    )


def _city(name: str) -> str:
    """Return the city as VIGOR spells it, if it is one of its own."""
    return next((city for city in CITIES if city.casefold() == name.casefold()), name)


def _read_city(raw: RawPath, city: str, splits: dict[str, str]) -> tuple[list[Place], int]:
    """Return the places of one city and the number of repeated lines; ``splits``: label file of each split."""
    panoramas = FolderIndex(raw, _first(raw, city, PANORAMA_FOLDERS, "panoramas"))
    tiles = FolderIndex(raw, _first(raw, city, TILE_FOLDERS, "tiles"))
    listed, repeated = _tile_list(read_lines(raw, _first(raw, city, TILE_LISTS, "list of tiles")))
    keys = assign_keys((city, tile) for tile in listed)
    views: dict[str, list[View]] = {}
    seen: dict[str, tuple[str, str]] = {}  # panorama: its split and columns, where it was named
    for split, labels in splits.items():
        candidates = tuple(path.replace("{labels}", labels) for path in LABELS)
        lines = read_lines(raw, _first(raw, city, candidates, f"labels for {split}"))
        if not lines.lines:
            raise BadInput(f"{raw / lines.name}: no panorama is listed; leave {city} out, or restore the file")
        for number, line in lines.lines:
            where = lines.where(number)
            columns = _columns(line, where)
            panorama, shown = columns[0], columns[1::3]
            said = " ".join([split, *columns])
            if panorama in seen:
                before, first = seen[panorama]
                if before != said:
                    raise BadInput(f"{where}: {panorama} contradicts its other line, {first}; keep one of the two")
                repeated += 1
                continue
            seen[panorama] = said, where
            for tile in shown:
                if tile not in listed:
                    raise BadInput(f"{where}: tile {tile} is not in {city}'s list of tiles; add it, or mend the line")
            positive, *others = shown
            semi = sorted({keys[city, tile] for tile in others} - {keys[city, positive]})
            north, east = _position(panorama.rsplit(",", 3)[1:3], panorama, where)
            view = View(panoramas.find(panorama, where), split, north, east, tuple(semi))
            views.setdefault(positive, []).append(view)
    places = []
    for tile, where in listed.items():
        north, east = _position(IMAGE_SUFFIX.sub("", tile).rsplit("_", 2)[1:], tile, where)
        image = tiles.find(tile, where)
        places.append(Place(keys[city, tile], city, tuple(splits), image, north, east, tuple(views.get(tile, ()))))
    return places, repeated


def _first(raw: RawPath, city: str, candidates: tuple[str, ...], what: str) -> RawPath:
    """Return the first of the candidates that exists; raise MissingRaw where none does."""
    paths = [candidate.format(city=city) for candidate in candidates]
    if found := first_located(raw, paths):
        return found
    tried = ", ".join(paths)
    raise MissingRaw(f"{raw}: no {what} of {city} (looked for {tried}); complete the folder, or name other cities")


def _tile_list(lines: Lines) -> tuple[dict[str, str], int]:
    """Return each listed tile with its file:line, and how many lines repeat one."""
    if not lines.lines:
        raise BadInput(f"{lines.name}: no tile is listed; leave the city out, or restore the file")
    listed: dict[str, str] = {}
    for number, tile in lines.lines:
        listed.setdefault(tile, lines.where(number))
    return listed, len(lines.lines) - len(listed)


def _columns(line: str, where: str) -> list[str]:
    """Return the 13 columns of a label line; check that offsets are numbers."""
    columns = line.split()
    if len(columns) != 13:
        raise BadInput(
            f"{where}: {len(columns)} columns instead of 13 (panorama, then 4 × tile, row offset, column offset); "
            "mend the line (a file name must not hold a space)"
        )
    for offset in columns[2::3] + columns[3::3]:
        read_number(offset, "an offset in pixels", where)
    return columns


def _position(texts: Sequence[str], name: str, where: str) -> tuple[float, float]:
    """Return latitude and longitude out of a file name, in degrees."""
    if len(texts) != 2:
        raise BadInput(f"{where}: {name} does not hold a latitude and a longitude; restore VIGOR's own file names")
    return read_position(texts, name, where)
