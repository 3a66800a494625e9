"""geostream's own sharding, from the raw folder's lists to the committed layout, with its defaults."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from geostream.layout import open_layout
from geostream.store import Store
from sharding import RawDataset, read_places, shard
from tests.benchmarks.shard_run import Job

DATASET = "vigor"


def places_of(raw: str | Path) -> RawDataset:
    return read_places("vigor", raw, train_cities=["NewYork", "Seattle"], test_cities=["Chicago", "SanFrancisco"])


def write_listing(raw: Path, path: Path) -> int:
    """The places of the raw folder as the peers get them; returns the number of images."""
    places = [[image.path for image in place.images()] for place in places_of(raw).places]
    path.write_text(json.dumps(places))
    return sum(len(place) for place in places)


def write(job: Job) -> None:
    shard(places_of(job.raw), Store.open(job.out), DATASET, workers=job.workers)


def read(job: Job) -> Iterator[tuple[str, bytes]]:
    """(raw path, stored bytes) of every image in the layout."""
    layout = open_layout(Store.open(job.out), DATASET)
    places = layout.places.to_pylist()
    tars = [layout.store.read(name) for name in layout.shard_names]
    for row in layout.members.to_pylist():
        if row["member"] != "json":
            place = places[row["place"]]
            source = place if row["member"].startswith("tile") else place["views"][int(row["member"][5:7])]
            yield source["source"], tars[row["shard"]][row["offset"] : row["offset"] + row["size"]]
