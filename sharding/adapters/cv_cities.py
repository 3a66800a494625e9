"""Read CV-Cities' raw folder: a panorama and the tile around it a place, in sixteen cities of six continents.

::

    <city>/img_info.csv      a line a pair: name, longitude, latitude, city, tile, panorama; no header; the last two are
                             paths below the raw folder
    <city>/sat_images/…      tiles
    <city>/pano_images/…     panoramas

Source of the layout: Huang, Zhou, Zhao, Gan, CV-Cities, IEEE JSTARS 2025 (code: GaoShuang98/CVCities, in it
``cvcities_base/dataset/cvcities.py``). From ``train/train_cvcities.py`` come the ten training cities, the six test
cities, and the sizes: tiles and panoramas are squeezed to the same square.

All test cities make one gallery. The authors evaluate each city on its own: name one by ``test_cities`` for that.
"""

from __future__ import annotations

from collections.abc import Sequence

from geostream.errors import BadInput, MissingRaw
from sharding.adapters.raw_files import Folders, find_root, located, read_lines, read_position
from sharding.places import Place, RawDataset, RawImage, View, assign_keys, repeats
from sharding.raw_path import RawPath

TILE_SIZE = (448, 448)
VIEW_SIZE = (448, 448)
TRAIN = (
    "barcelona", "captown", "losangeles", "maynila", "melbourne", "mexico", "newyork", "paris", "santiago", "tokyo",
)  # fmt: skip
TEST = ("london", "rio", "seattle", "singapore", "sydney", "taipei")
LIST = "img_info.csv"


def read_places(
    raw: RawPath, *, train_cities: Sequence[str] | None = None, test_cities: Sequence[str] | None = None
) -> RawDataset:
    """Read a CV-Cities folder.

    Args:
        raw: the folder.
        train_cities: names of the training cities, as their folders are called; None: those of the authors' ten that
            are there, since each city is a download of its own.
        test_cities: names of the test cities; None: those of the authors' six that are there.

    Returns:
        Its places. Missing images are marked, not refused.

    Raises:
        BadInput: a city is for training and testing, or a list is malformed.
        MissingRaw: a city's list is missing.
    """
    raw = find_root(raw, "CV-Cities' folders of cities", tuple(f"{city}/{LIST}" for city in (*TRAIN, *TEST)))
    lists = {
        city: located(raw, f"{city}/{LIST}") for city in (*TRAIN, *TEST, *(train_cities or ()), *(test_cities or ()))
    }
    absent = [city for city in (*TRAIN, *TEST) if not lists[city].exists()]
    train, test = (
        sorted(set(usual) - set(absent) if given is None else set(given))
        for usual, given in ((TRAIN, train_cities), (TEST, test_cities))
    )
    if not train or not test:
        raise MissingRaw(f"{raw}: no {TRAIN[0]}/{LIST} or that of another city, to train and to test on.")
    if both := sorted(set(train) & set(test)):
        raise BadInput(f"{', '.join(both)}: for training and test at once; CV-Cities wants different cities")
    folders = Folders(raw)
    places: list[Place] = []
    repeated = 0
    for city in (*train, *test):
        of_city, again = _read_city(raw, lists[city], folders, city, "train" if city in train else "test")
        places += of_city
        repeated += again
    return RawDataset(
        adapter="cv-cities",
        root=raw,
        options={"train_cities": train, "test_cities": test},
        coordinates="latlon",
        tile_size=TILE_SIZE,
        view_size=VIEW_SIZE,
        places=tuple(places),
        notes=(*repeats(repeated), *_left_out(absent, train_cities is None or test_cities is None)),
    )


def _left_out(absent: Sequence[str], matters: bool) -> tuple[str, ...]:
    """Return the note on cities of the authors that are not there."""
    return (f"not there, and left out: {', '.join(absent)}",) if absent and matters else ()


def _read_city(raw: RawPath, path: RawPath, folders: Folders, city: str, split: str) -> tuple[list[Place], int]:
    """Return the places of one city and the number of repeated lines; ``path``: of its list."""
    if not path.exists():
        raise MissingRaw(f"{raw}: no {city}/{LIST}; complete the folder, or name other cities.")
    tiles: dict[str, tuple[RawImage, tuple[float, float]]] = {}
    views: dict[str, list[View]] = {}
    seen: dict[str, tuple[str, str]] = {}  # panorama: its tile, where it was named
    repeated = 0
    for where, cells in read_lines(raw, path).cells():
        if len(cells) != 6:
            raise BadInput(
                f"{where}: {len(cells)} columns instead of 6 (name, longitude, latitude, city, tile, panorama); mend "
                "the line"
            )
        at = read_position((cells[2], cells[1]), cells[0], where)
        tile, panorama = (folders.find(cell.lstrip("/"), where) for cell in cells[4:])
        before = seen.setdefault(panorama.path, (tile.path, where))
        first = tiles.setdefault(tile.path, (tile, at))
        if before[0] != tile.path or first[1] != at:
            other = before[1] if before[0] != tile.path else first[0].named
            raise BadInput(f"{where}: {cells[0]} contradicts an earlier line, {other}; keep one of the two")
        if before[1] != where:
            repeated += 1
            continue
        views.setdefault(tile.path, []).append(View(panorama, split, *at))
    if not tiles:
        raise BadInput(f"{raw}/{city}/{LIST}: no pair is listed; leave {city} out, or restore the file")
    keys = assign_keys((city, path.rpartition("/")[2]) for path in tiles)
    return [
        Place(keys[city, path.rpartition("/")[2]], city, (split,), tile, *at, tuple(views[path]))
        for path, (tile, at) in tiles.items()
    ], repeated
