"""What two layouts of a data set have in common, by their indexes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from geostream.layout.diff import Places, diff_layouts
from geostream.reclustering.rewrite import rewrite
from geostream.store import Store
from tests.helpers import tiny_places, write_layout


def test_what_came_went_and_changed(tmp_path: Path) -> None:
    world = tiny_places(places=5, test_places=2, distractors=0)
    before = write_layout(Store.open(tmp_path / "before"), world)
    other = replace(world[1], images=world[1].images | {"tile.jpg": world[0].images["tile.jpg"]})
    last = [replace(place, key=f"new-{number}", semi_positives=()) for number, place in enumerate(world[:2])]
    after = write_layout(Store.open(tmp_path / "after"), [world[0], other, *world[3:], *last][::-1])
    diff = diff_layouts(before, after)
    assert diff.came == Places(2, ("new-0", "new-1"))
    assert diff.went == Places(1, (world[2].key,))
    assert diff.changed == Places(1, (world[1].key,))
    assert diff.pairs == {"train": (5, 6), "test": (2, 2)}
    assert diff.bytes == (before.info["bytes"], after.info["bytes"])
    assert (diff.borrowed, diff.own, diff.own_bytes) == (0, len(after.shard_names), after.info["bytes"])
    back = diff_layouts(after, before)
    assert (back.came, back.went, back.changed) == (diff.went, diff.came, diff.changed)


def test_another_order_is_no_difference(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    before = write_layout(store, tiny_places())
    after = rewrite(store, before, np.array_split(np.arange(before.n_places, dtype=np.int32)[::-1], 3), {})
    diff = diff_layouts(before, after)
    assert diff.came.count == diff.went.count == diff.changed.count == 0
    assert diff.same_gallery and diff.own == 3


def test_of_an_older_layout_the_gallery_is_not_known(tmp_path: Path) -> None:
    layout = write_layout(Store.open(tmp_path), tiny_places())
    old = replace(layout, info={key: value for key, value in layout.info.items() if key != "gallery"})
    assert diff_layouts(layout, layout).same_gallery is True and diff_layouts(old, layout).same_gallery is None
