"""Plan rendered cities as University-1652's raw folder: buildings from above, from the air, and from the street.

    train/satellite/0001/0001.jpg           test/query_satellite/…     test/gallery_satellite/…
    train/drone/0001/image-01.jpeg …        test/query_drone/…         test/gallery_drone/…
    train/street/0001/1.jpg …               test/query_street/…        test/gallery_street/…
    train/google/0001/1.jpg

Buildings are numbered over training and test, so each set has gaps. A test building's pictures lie in the queries and
in the gallery; a distractor's in the gallery alone. A tile has its building in the middle, north up. The drone flies
about three times around while it comes down, always looking at the building, as the real one does (Zheng et al., ACM
MM 2020). A street picture, or one of `google`, is taken from where the building can be seen.
"""

from __future__ import annotations

import math

import numpy as np

from geostream.errors import BadInput
from sharding.simcity.map import Floats
from sharding.simcity.plan import RawPlan, Town, standing_room
from sharding.simcity.shots import PITCH, DroneCamera, Scene, Shot, StreetCamera, TileCamera

APART = 45.0  # metres between two buildings' middles, at least
SMALLEST = 8.0  # metres: a building's shorter side
ROUNDS = 2.8  # of the drone's flight: not quite three, so that no two pictures are from the same side
FROM, TO = 105.0, 55.0  # metres from drone to building, at its beginning and end
WANDER = 3.0  # metres: how far from the building's middle the drone may look
STREET = (14.0, PITCH)  # metres from a building's middle to a camera on the street
TRIES = 64
SETS = {  # kind of picture: the folders of a training building, of a test building, of a distractor
    "satellite": (
        ("train/satellite",),
        ("test/query_satellite", "test/gallery_satellite"),
        ("test/gallery_satellite",),
    ),
    "drone": (("train/drone",), ("test/query_drone", "test/gallery_drone"), ("test/gallery_drone",)),
    "street": (("train/street",), ("test/query_street", "test/gallery_street"), ("test/gallery_street",)),
    "google": (("train/google",), (), ()),
}
TRAIN, TEST, DISTRACTOR = range(3)


def plan_university(
    towns: list[Town],
    rng: np.random.Generator,
    *,
    drone_views: int = 54,
    street_views: int = 3,
    distractor_share: float = 0.15,
) -> RawPlan:
    """Plan the towns' buildings as University-1652: distractors, and of the others half for training, half for test.

    Args:
        towns: the cities.
        rng: draws roles and numbers.
        drone_views: of each building, 1 to 99.
        street_views: of each building, 1 to 99.
        distractor_share: of all buildings; the real one has 250 of 1,652.

    Raises:
        BadInput: an option makes no sense, or there are too few buildings.
    """
    if not 1 <= drone_views <= 99 or not 1 <= street_views <= 99:
        raise BadInput(f"drone_views {drone_views}, street_views {street_views}: choose from 1 to 99")
    if not 0 <= distractor_share < 1:
        raise BadInput(f"distractor_share {distractor_share}: choose from 0 up to below 1")
    targets = [(number, target) for number, town in enumerate(towns) for target in _targets(town)]
    distractors = math.ceil(distractor_share * len(targets))
    tests = (len(targets) - distractors) // 2
    if tests < 1:
        raise BadInput(f"{len(targets)} buildings are too few for training, test and distractors: render more")
    roles = np.repeat([DISTRACTOR, TEST, TRAIN], [distractors, tests, len(targets) - distractors - tests])
    roles, names = rng.permutation(roles), rng.permutation(len(targets))
    scenes: list[list[Scene]] = [[] for _ in towns]
    for (number, target), role, name in zip(targets, roles, names, strict=True):
        scenes[number].append(_scene(towns[number], target, int(role), f"{name:04d}", drone_views, street_views))
    views = sum(len(scene.shots) - 1 for of_town in scenes for scene in of_town)
    return RawPlan(scenes, {}, len(targets), 0, views)


def _targets(town: Town) -> list[Floats]:
    """Return the buildings (west, south, east, north) that get pictures: large enough, and well apart."""
    buildings = town.city.buildings
    sides = np.minimum(buildings[:, 2] - buildings[:, 0], buildings[:, 3] - buildings[:, 1])
    middles = (buildings[:, :2] + buildings[:, 2:]) / 2
    inside = ((middles >= 0) & (middles <= town.spec.extent)).all(axis=1)
    chosen: list[int] = []
    for n in town.rng.permutation(np.flatnonzero(inside & (sides >= SMALLEST))):
        if not chosen or np.hypot(*(middles[chosen] - middles[n]).T).min() >= APART:
            chosen.append(int(n))
    return [buildings[n] for n in chosen]


def _scene(town: Town, target: Floats, role: int, name: str, drone_views: int, street_views: int) -> Scene:
    rng = town.rng
    x, y = float(target[0] + target[2]) / 2, float(target[1] + target[3]) / 2
    shots = [Shot(TileCamera(x, y), _files("satellite", role, name, f"{name}.jpg"))]
    start, light = rng.uniform(0, 2 * math.pi), float(rng.uniform(0.92, 1.08))
    for n in range(drone_views):
        aim = rng.uniform(-WANDER, WANDER, 2)
        camera = DroneCamera(
            x=x + float(aim[0]),
            y=y + float(aim[1]),
            heading=float((start + 2 * math.pi * ROUNDS * n / drone_views) % (2 * math.pi)),
            distance=FROM + (TO - FROM) * n / max(1, drone_views - 1),
            light=light,
        )
        shots.append(Shot(camera, _files("drone", role, name, f"image-{n + 1:02d}.jpeg")))
    cameras = _street_cameras(town, target, street_views + 1)
    for n, street in enumerate(cameras[:street_views]):
        shots.append(Shot(street, _files("street", role, name, f"{n + 1}.jpg")))
    for street in cameras[street_views:]:
        shots.append(Shot(street, _files("google", role, name, "1.jpg")))
    return Scene(x, y, tuple(shot for shot in shots if shot.files))


def _files(kind: str, role: int, name: str, file: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}/{file}" for folder in SETS[kind][role])


def _street_cameras(town: Town, target: Floats, wanted: int) -> list[StreetCamera]:
    """Return up to ``wanted`` cameras around the building that see it without a tree or building in between."""
    rng = town.rng
    middle = (target[:2] + target[2:]) / 2
    distance, bearing = rng.uniform(*STREET, TRIES), rng.uniform(0, 2 * math.pi, TRIES)
    light = rng.uniform(0.95, 1.05, TRIES)
    x, y = middle[0] - distance * np.sin(bearing), middle[1] - distance * np.cos(bearing)
    near = town.city.window((x.min(), y.min(), x.max(), y.max()))
    west, south, east, north = near.buildings.T
    beside = (west >= target[2]) | (east <= target[0]) | (south >= target[3]) | (north <= target[1])
    west, south, east, north = near.buildings[beside].T
    tree_x, tree_y, radius = near.trees.T
    way = np.linspace(0, 1, 40)[:, None]
    px, py = (a[:, None, None] + way * (b - a)[:, None, None] for a, b in ((x, middle[0]), (y, middle[1])))
    blocked = ((px > west) & (px < east) & (py > south) & (py < north)).any(axis=(1, 2))
    blocked |= (np.hypot(px - tree_x, py - tree_y) < radius).any(axis=(1, 2))
    free = np.flatnonzero(standing_room(town.city, x, y) & ~blocked)[:wanted]
    return [StreetCamera(float(x[n]), float(y[n]), float(bearing[n]), float(light[n])) for n in free]
