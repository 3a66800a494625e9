"""Render cities in place of a data set where nobody named a raw folder: in the demo, and in ``shard-…``.

Pictures are small enough to train on two CPU cores in minutes, and shards small enough that a layout has several.
VIGOR's panoramas stand within a tenth of the tile's side of its centre; the real ones stand up to a quarter off, which
is far harder to learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geostream.errors import BadInput
from sharding.simcity import RenderSummary, render_cities
from sharding.simcity.layouts import cities_of

TILE = 48  # pixels
SHARD_BYTES = 2**19


@dataclass(frozen=True)
class _Rendered:
    """Hold height and width of the views, raw and as stored, and further options of rendering and sharding."""

    view_size: tuple[int, int]
    stored: tuple[int, int]
    rendering: dict[str, Any]
    sharding: dict[str, Any]


KINDS = {
    "vigor": _Rendered((32, 128), (32, 128), {"max_offset": 0.1}, {}),
    "cvusa": _Rendered((32, 176), (32, 176), {}, {}),
    # Some training images are missing, as in every copy of CVACT: in a small city that is more than one in a thousand.
    "cvact": _Rendered((64, 128), (32, 128), {}, {"max_broken": 0.03}),
    "university1652": _Rendered((48, 48), (48, 48), {}, {}),
    "cv-cities": _Rendered((64, 128), (32, 128), {}, {}),
    "gta-uav": _Rendered((48, 64), (48, 48), {}, {}),
    "photos": _Rendered((64, 128), (32, 128), {}, {}),
}


def render(raw: Path, adapter: str, city: str, seed: int) -> RenderSummary:
    """Render cities as an adapter's raw folder; return at once where they lie there already.

    Args:
        raw: the folder.
        adapter: whose raw layout it is.
        city: size of the cities, "small" or "demo".
        seed: of all that is random.

    Raises:
        BadInput: there is no such adapter or size.
    """
    kind = _kind(adapter)
    cities, options = cities_of(adapter, city)
    options = kind.rendering | options
    return render_cities(
        raw, cities, seed=seed, adapter=adapter, tile_size=TILE, view_size=kind.view_size, **options
    )  # fmt: skip


def shard_options(adapter: str) -> dict[str, Any]:
    """Return the options of sharding that fit the adapter's rendered cities; raise BadInput where it has none."""
    kind = _kind(adapter)
    return {"tile_size": (TILE, TILE), "view_size": kind.stored, "shard_bytes": SHARD_BYTES, **kind.sharding}


def dataset_name(adapter: str) -> str:
    """Return the name of an adapter's rendered cities in a store, which is also that of their recipe."""
    _kind(adapter)
    return "simcity" if adapter == "vigor" else f"simcity-{adapter}"


def _kind(adapter: str) -> _Rendered:
    if adapter not in KINDS:
        raise BadInput(
            f"no cities are rendered for {adapter!r}: choose one of {', '.join(KINDS)}, or name a raw folder"
        )
    return KINDS[adapter]
