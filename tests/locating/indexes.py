"""A small index on a store: striped tiles, an untrained network, photos that are the layout's own views."""

from __future__ import annotations

import io

from PIL import Image

from geostream.layout import Layout
from geostream.locating.index import Index
from geostream.locating.make import make_index
from geostream.store import Store
from tests.helpers import TinyPlace, tiny_places, write_layout
from tests.runs.small_runs import run_with_checkpoint


def small_index(store: Store, name: str = "base", *, test_places: int = 4) -> tuple[Index, list[TinyPlace]]:
    """An index of a layout in the store ``store``, made with the run ``run``, and the layout's places."""
    places = tiny_places(test_places=test_places)
    layout = write_layout(store, places)
    run, checkpoint = run_with_checkpoint(store, layout, "run")
    return make_index(run, checkpoint, layout, name)[0], places


def photos_of(places: list[TinyPlace]) -> list[Image.Image]:
    return [Image.open(io.BytesIO(place.images["view-00.jpg"])) for place in places if "view-00.jpg" in place.images]


def no_training_tiles(store: Store) -> Layout:
    return write_layout(store, tiny_places(places=0, test_places=3, seed=8), name="untrained")


def other_layout(store: Store, name: str, seed: int = 7) -> Layout:
    return write_layout(store, tiny_places(places=6, test_places=0, distractors=5, seed=seed), name=name)
