"""Plan a rendered city as the raw folders of CVUSA, CVACT and CV-Cities: a panorama, and a tile around it, a place.

CVUSA, with images numbered from 1 over all cities:

    bingmap/19/0000001.jpg      streetview/panos/0000001.jpg
    splits/train-19zl.csv       splits/val-19zl.csv: tile, panorama, annotation (never rendered, often not there)
    split_locations/all.csv     row n - 1: latitude and longitude of tile n, then of its panorama

CVACT, with images called by 22 characters:

    ACT_data.mat                panoIds, utm (east, north), trainSet.trainInd, valSet.valInd, valSetAll.valInd
    ANU_data_small/streetview/<id>_grdView.jpg    ANU_data_small/satview_polish/<id>_satView_polish.jpg
    ANU_data_test/streetview/…                    ANU_data_test/satview_polish/…

CV-Cities, with a folder a city, whose name says what it is for:

    <city>/img_info.csv         name, longitude, latitude, city, tile, panorama: no header
    <city>/sat_images/<name>.jpg                  <city>/pano_images/<name>.jpg

CVACT's indexes count from 1. Its test set is `valSetAll`, the validation set a part of it, so its images lie in both
folders. As in every copy, some training images are missing; and some test panoramas stand within 5 metres of another.
(Read from the code that others published to load the three.)
"""

from __future__ import annotations

import io
import math
from typing import NamedTuple

import numpy as np
import scipy.io
from numpy.typing import NDArray

from geostream.errors import BadInput
from sharding.simcity.plan import TRIES, RawPlan, Town, panorama_id, standing_room
from sharding.simcity.shots import PITCH, Panorama, Scene, Shot, TileCamera

REACH = 0.2 * PITCH  # metres, east and north, of a panorama from its point of the grid
MISALIGNED = 1.0  # metres, east and north, of a tile's centre from its panorama, at most
TWINS = (1.5, 4.5)  # metres between two test places that are right for one another
SOUTH_WEST = (690_000.0, 6_090_000.0)  # of the first city: UTM, zone 55 south, about Canberra
CITY_STEP = 20_000.0  # metres east from one city's corner to the next one's


class _Spot(NamedTuple):
    """Hold where a place's panorama stands, and its tile's centre."""

    x: float
    y: float
    tile_x: float
    tile_y: float
    light: float

    def scene(self, tile_files: tuple[str, ...], view_files: tuple[str, ...]) -> Scene:
        tile = Shot(TileCamera(self.tile_x, self.tile_y), tile_files)
        view = Shot(Panorama(self.x, self.y, self.light), view_files)
        return Scene(self.x, self.y, tuple(shot for shot in (tile, view) if shot.files))


def plan_cvusa(towns: list[Town], rng: np.random.Generator, *, val_share: float = 0.2) -> RawPlan:
    """Plan the towns as CVUSA.

    Args:
        towns: the cities.
        rng: draws the splits and numbers.
        val_share: of the places, drawn from among all; the real one has 8,884 of 44,416.

    Raises:
        BadInput: the share makes no sense, or there are too few places for two splits.
    """
    _check_share("val_share", val_share)
    spots = [(city, spot) for city, town in enumerate(towns) for spot in _spots(town)]
    numbers = 1 + rng.permutation(len(spots))
    (val,) = _split(len(spots), [val_share], rng)
    scenes: list[list[Scene]] = [[] for _ in towns]
    rows: dict[int, str] = {}
    located: dict[int, str] = {}
    for (city, spot), number in zip(spots, numbers.tolist(), strict=True):
        tile, view = f"bingmap/19/{number:07d}.jpg", f"streetview/panos/{number:07d}.jpg"
        scenes[city].append(spot.scene((tile,), (view,)))
        rows[number] = f"{tile},{view},streetview/annotations/{number:07d}.png"
        spec = towns[city].spec
        points = (*spec.degrees(spot.tile_x, spot.tile_y), *spec.degrees(spot.x, spot.y))
        located[number] = ",".join(f"{degree:.8f}" for degree in points)
    order = rng.permutation(len(spots))  # the lists are in no order, neither of place nor of number
    lists = {
        "splits/train-19zl.csv": [rows[numbers[n]] for n in order if not val[n]],
        "splits/val-19zl.csv": [rows[numbers[n]] for n in order if val[n]],
        "split_locations/all.csv": [located[number] for number in sorted(located)],
    }
    files = {path: "".join(f"{line}\n" for line in lines).encode() for path, lines in lists.items()}
    return RawPlan(scenes, files, len(spots), 0, len(spots))


def plan_cvact(
    towns: list[Town],
    rng: np.random.Generator,
    *,
    val_share: float = 0.15,
    test_share: float = 0.3,
    twin_share: float = 0.1,
    missing: int = 3,
) -> RawPlan:
    """Plan the towns as CVACT.

    Args:
        towns: the cities.
        rng: draws the sets and ids.
        val_share: share of the places in the validation set.
        test_share: share of the places in the test set alone.
        twin_share: share of the latter that get another test place within 5 metres, as far as there is room.
        missing: how many training places lack images: a third each the panorama, the tile, and both.

    Raises:
        BadInput: a share makes no sense, or there are too few places.
    """
    _check_share("val_share", val_share)
    _check_share("test_share", test_share)
    _check_share("val_share and test_share together", val_share + test_share)
    if not 0 <= twin_share <= 1 or missing < 0:
        raise BadInput(f"twin_share {twin_share}, missing {missing}: choose a share from 0 to 1, and no less than 0")
    spots = [(city, spot) for city, town in enumerate(towns) for spot in _spots(town)]
    val, test = _split(len(spots), [val_share, test_share], rng)
    for city, spot in [spots[n] for n in np.flatnonzero(test)]:
        if rng.random() < twin_share and (twin := _twin(towns[city], spot, rng)):
            spots.append((city, twin))
    twins = np.ones(len(spots) - len(test), bool)
    val, test = np.append(val, ~twins), np.append(test, twins)
    train = ~val & ~test
    if missing >= train.sum():
        raise BadInput(f"missing {missing}: as many as there are training places; render more of them")
    gone = rng.permutation(np.flatnonzero(train))[:missing].tolist()
    no_view, no_tile = {n for k, n in enumerate(gone) if k % 3 != 1}, {n for k, n in enumerate(gone) if k % 3 != 0}
    ids = [panorama_id(rng) for _ in spots]
    scenes: list[list[Scene]] = [[] for _ in towns]
    utm = np.zeros((len(spots), 2))
    for n, (city, spot) in enumerate(spots):
        folders = ["ANU_data_small"] * (not test[n]) + ["ANU_data_test"] * (not train[n])
        tiles = [f"{folder}/satview_polish/{ids[n]}_satView_polish.jpg" for folder in folders if n not in no_tile]
        views = [f"{folder}/streetview/{ids[n]}_grdView.jpg" for folder in folders if n not in no_view]
        scenes[city].append(spot.scene(tuple(tiles), tuple(views)))
        utm[n] = SOUTH_WEST[0] + city * CITY_STEP + spot.x, SOUTH_WEST[1] + spot.y
    order = np.argsort(ids)  # in no order of place
    content: dict[str, object] = {"panoIds": np.array(ids)[order], "utm": utm[order]}
    for name, field, chosen in (("trainSet", "train", train), ("valSet", "val", val), ("valSetAll", "val", val | test)):
        index = 1 + np.flatnonzero(chosen[order]).astype(np.int32)[:, None]
        content[name] = {f"{field}Num": len(index), f"{field}Ind": index}  # the indexes are the second field
    return RawPlan(scenes, {"ACT_data.mat": _mat(content)}, len(spots), 0, len(spots) - len(no_view))


def plan_cv_cities(towns: list[Town], rng: np.random.Generator) -> RawPlan:
    """Plan each town as a city of CV-Cities.

    Args:
        towns: the cities.
        rng: draws the order of the lists.
    """
    scenes: list[list[Scene]] = []
    files: dict[str, bytes] = {}
    for town in towns:
        city, spots, rows = town.spec.name, _spots(town), []
        of_town = []
        for spot in spots:
            name = panorama_id(town.rng)
            tile, view = f"{city}/sat_images/{name}.jpg", f"{city}/pano_images/{name}.jpg"
            of_town.append(spot.scene((tile,), (view,)))
            latitude, longitude = town.spec.degrees(spot.x, spot.y)
            rows.append(f"{name},{longitude:.8f},{latitude:.8f},{city},{tile},{view}")
        scenes.append(of_town)
        lines = [rows[n] for n in rng.permutation(len(rows))]
        files[f"{city}/img_info.csv"] = "".join(f"{line}\n" for line in lines).encode()
    places = sum(map(len, scenes))
    return RawPlan(scenes, files, places, 0, places)


def _check_share(name: str, share: float) -> None:
    if not 0 < share < 1:
        raise BadInput(f"{name} {share}: choose a share above 0 and below 1")


def _spots(town: Town) -> list[_Spot]:
    """Return one place at each point of the city's grid, where somebody can stand near it."""
    rng, spec = town.rng, town.spec
    spots = []
    for j in range(spec.rows):
        for i in range(spec.columns):
            x = i * PITCH + rng.uniform(-REACH, REACH, TRIES)
            y = j * PITCH + rng.uniform(-REACH, REACH, TRIES)
            beside, light = rng.uniform(-MISALIGNED, MISALIGNED, 2), float(rng.uniform(0.95, 1.05))
            free = np.flatnonzero(standing_room(town.city, x, y))[:1]
            spots += [
                _Spot(float(x[n]), float(y[n]), float(x[n] + beside[0]), float(y[n] + beside[1]), light) for n in free
            ]
    return spots


def _twin(town: Town, spot: _Spot, rng: np.random.Generator) -> _Spot | None:
    """Return another place near ``spot``, where there is room for one."""
    distance, angle = rng.uniform(*TWINS, TRIES), rng.uniform(0, 2 * math.pi, TRIES)
    dx, dy = distance * np.sin(angle), distance * np.cos(angle)
    for n in np.flatnonzero(standing_room(town.city, spot.x + dx, spot.y + dy))[:1]:
        east, north = float(dx[n]), float(dy[n])
        return _Spot(spot.x + east, spot.y + north, spot.tile_x + east, spot.tile_y + north, spot.light)
    return None


def _split(n: int, shares: list[float], rng: np.random.Generator) -> list[NDArray[np.bool_]]:
    """Return for each share a mask of that many of the n places, at least one; none is in two of them."""
    counts = [max(1, round(share * n)) for share in shares]
    if sum(counts) >= n:
        raise BadInput(f"{n} places are too few to split: render a larger city")
    order = rng.permutation(n)
    masks = []
    for chosen in np.split(order[: sum(counts)], np.cumsum(counts)[:-1]):
        masks.append(np.isin(np.arange(n), chosen))
    return masks


def _mat(content: dict[str, object]) -> bytes:
    """Return a MATLAB 5 file, without the time that SciPy writes into its head."""
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, content, do_compression=True)
    return b"MATLAB 5.0 MAT-file, rendered".ljust(116) + buffer.getvalue()[116:]
