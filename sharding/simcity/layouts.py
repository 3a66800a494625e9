"""List the raw layouts that a city can be rendered in, and cities of two sizes for each.

"small" is to see something run; "demo" is to train on for some minutes on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from geostream.errors import BadInput
from sharding.simcity.geotiff import plan_photos
from sharding.simcity.gta_uav import plan_gta_uav
from sharding.simcity.pairs import plan_cv_cities, plan_cvact, plan_cvusa
from sharding.simcity.plan import CitySpec, RawPlan
from sharding.simcity.university import plan_university
from sharding.simcity.vigor import plan_vigor


@dataclass(frozen=True)
class RawLayout:
    """Describe how a data set's raw folder is rendered.

    Attributes:
        plan: the planner that decides what is written where.
        view_size: height and width of views in pixels, by default.
        sizes: by name, the cities and the options of ``plan`` that go with them.
    """

    plan: Callable[..., RawPlan]
    view_size: tuple[int, int]
    sizes: dict[str, tuple[list[CitySpec], dict[str, Any]]]


def _vigor(rows: int, columns: int, test_rows: int, test_columns: int) -> tuple[list[CitySpec], dict[str, Any]]:
    """Return VIGOR's four cities, two for training and two for testing."""
    train = [CitySpec(name, rows, columns) for name in ("NewYork", "Seattle")]
    return train + [CitySpec(name, test_rows, test_columns) for name in ("Chicago", "SanFrancisco")], {}


def _square(names: tuple[str, ...], side: int, **options: Any) -> tuple[list[CitySpec], dict[str, Any]]:
    return [CitySpec(name, side, side) for name in names], options


AROUND_THE_WORLD = ("barcelona", "paris", "london", "rio")  # as CV-Cities calls them: two for training, two for testing
AMERICAN = ("Austin", "Denver", "Phoenix", "Portland")
CAMPUSES = ("Kyoto", "Leiden", "Sydney", "Toronto")
COUNTIES = ("Blaine", "Paleto", "Senora", "Tataviam")
LAYOUTS = {
    "vigor": RawLayout(plan_vigor, (48, 192), {"small": _vigor(6, 8, 6, 6), "demo": _vigor(60, 60, 22, 22)}),
    "cvusa": RawLayout(plan_cvusa, (32, 176), {"small": _square(AMERICAN, 6), "demo": _square(AMERICAN, 40)}),
    "cvact": RawLayout(
        plan_cvact, (64, 128), {"small": _square(("Canberra",), 12), "demo": _square(("Canberra",), 80)}
    ),
    "university1652": RawLayout(
        plan_university,
        (64, 64),
        {"small": _square(CAMPUSES, 10, drone_views=3), "demo": _square(CAMPUSES, 22, drone_views=12)},
    ),
    "cv-cities": RawLayout(
        plan_cv_cities,
        (64, 128),
        {"small": _square(AROUND_THE_WORLD, 6), "demo": _square(AROUND_THE_WORLD, 40)},
    ),
    "gta-uav": RawLayout(
        plan_gta_uav, (48, 64), {"small": _square(COUNTIES, 12), "demo": _square(COUNTIES, 40, views_a_tile=4.0)}
    ),
    "photos": RawLayout(plan_photos, (64, 128), {"small": _square(("Graz",), 20), "demo": _square(("Graz",), 60)}),
}


def raw_layout(adapter: str) -> RawLayout:
    """Return the raw layout of an adapter; raise BadInput where nothing can be rendered for it."""
    if adapter not in LAYOUTS:
        raise BadInput(f"no city can be rendered for {adapter!r}: choose one of {', '.join(LAYOUTS)}")
    return LAYOUTS[adapter]


def cities_of(adapter: str, size: str) -> tuple[list[CitySpec], dict[str, Any]]:
    """Return the cities of a size, and the planner's options that go with them.

    Args:
        adapter: whose raw layout it is.
        size: "small" or "demo".

    Raises:
        BadInput: there is no such adapter or size.
    """
    sizes = raw_layout(adapter).sizes
    if size not in sizes:
        raise BadInput(f"no size {size!r}: choose one of {', '.join(sizes)}")
    return sizes[size]
