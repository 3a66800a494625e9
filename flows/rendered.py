"""The rendered cities that stand in for VIGOR where nobody named a raw folder: in the demo, and in ``shard-vigor``.

Decides their sizes: pictures small enough to train on two CPU cores in minutes, stored as they are rendered, in shards
small enough that streaming them means something. Panoramas stand within a tenth of the tile's side of its centre;
VIGOR's stand up to a quarter off, which is far harder to learn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sharding.simcity import RenderSummary, render_cities, vigor_cities

DATASET = "simcity"
TILE, VIEW = (48, 48), (32, 128)  # height and width in pixels
SHARD_OPTIONS: dict[str, Any] = {"tile_size": TILE, "view_size": VIEW, "shard_bytes": 2**19}
MAX_OFFSET = 0.1


def render(raw: Path, city: str, seed: int) -> RenderSummary:
    """Render VIGOR's four cities, of size ``city``, into ``raw``; done at once where they lie there already."""
    return render_cities(raw, vigor_cities(city), seed=seed, tile_size=TILE[0], view_size=VIEW, max_offset=MAX_OFFSET)
