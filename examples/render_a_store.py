"""Render two small cities and shard them, so that the other examples have a store to read.

    python examples/render_a_store.py /tmp/store

Takes some seconds and 2 MB. It shows, too, how a raw data set becomes a layout: an adapter reads the raw folder into
places, and ``shard`` writes them as tar shards with an index. For the real data sets, the command ``geostream shard``
does the same.
"""

import sys
import tempfile
from pathlib import Path

import geostream
from sharding import ShardOptions, read_places, shard
from sharding.simcity import CitySpec, render_cities

# VIGOR's protocol: two cities to train on, two others to test on.
CITIES = [CitySpec(name, rows=8, columns=10) for name in ("NewYork", "Seattle", "Chicago", "SanFrancisco")]


def main(store_url: str) -> None:
    """Write the layout ``simcity/layouts/base`` into the store."""
    store = geostream.Store.open(store_url)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw")
        render_cities(raw, CITIES, seed=0, tile_size=48, view_size=(32, 128), max_offset=0.1)
        options = ShardOptions(tile_size=(48, 48), view_size=(32, 128), shard_bytes=2**18)
        layout = shard(read_places("vigor", raw), store, dataset="simcity", options=options).layout
    print(f"{layout.n_places} places in {len(layout.shard_names)} shards: {layout.store.url}")


if __name__ == "__main__":  # sharding uses processes, which import this file
    main(sys.argv[1])
