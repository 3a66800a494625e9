"""A new data set is one function and one line in the registry: the example for whoever adds one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from geostream.errors import BadInput
from geostream.store import Store
from sharding import ADAPTERS, Place, RawDataset, ShardOptions, View, read_places, shard
from sharding.adapters import Adapter
from sharding.adapters.raw_files import Folders, find_root, read_lines, read_position
from sharding.places import assign_keys
from tests.vigor_raw import jpeg


def read_landmarks(raw: Path, *, test: str = "test.csv") -> RawDataset:
    """Read a folder of images and two lists whose lines are: tile, query, latitude, longitude.

    Raises BadInput, naming file and line, where a list is missing or malformed.
    """
    raw = find_root(raw, "train.csv and the images", ("train.csv",))
    folders, lines = Folders(raw), []
    for split, name in (("train", "train.csv"), ("test", test)):
        for where, cells in read_lines(raw, raw / name).cells():
            if len(cells) != 4:
                raise BadInput(f"{where}: {len(cells)} columns instead of tile, query, latitude, longitude")
            lines.append((split, where, cells))
    keys = assign_keys(("world", cells[0]) for _, _, cells in lines)
    places = []
    for split, where, (tile, query, *position) in lines:
        at = read_position(position, tile, where)
        view = View(folders.find(query, where), split, *at)
        places.append(Place(keys["world", tile], "world", (split,), folders.find(tile, where), *at, (view,)))
    return RawDataset("landmarks", raw, {"test": test}, "latlon", (384, 384), (384, 384), tuple(places))


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(ADAPTERS, "landmarks", Adapter(read_landmarks, "https://example.org/landmarks"))
    root = tmp_path / "raw"
    for name, numbers in (("train", (3, 1, 2)), ("test", (4,))):
        (root / name).mkdir(parents=True)
        lines = [f"{name}/tile-{number}.jpg, {name}/query-{number}.JPG, 48.{number}, 2.3" for number in numbers]
        (root / f"{name}.csv").write_text("\n".join(lines))
        for number in numbers:
            for kind in ("tile", "query"):
                (root / name / f"{kind}-{number}.jpg").write_bytes(jpeg(np.random.default_rng(number), (16, 16)))
    return root


def test_it_is_sharded_like_any_other(raw: Path, tmp_path: Path) -> None:
    options = ShardOptions(tile_size=(8, 8), view_size=(8, 8))
    layout = shard(
        read_places("landmarks", raw), Store.open(tmp_path / "store"), "landmarks", options=options, workers=1
    ).layout
    assert layout.keys == ["world_test-tile-4", *(f"world_train-tile-{number}" for number in (1, 2, 3))]
    assert layout.info["pairs"] == {"test": 1, "train": 3} and layout.info["source"]["options"]["test"] == "test.csv"
    assert layout.position[:, 0].tolist() == [48.4, 48.1, 48.2, 48.3]


def test_its_options_and_its_missing_files_are_told(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="landmarks .*city; .*test"):
        read_places("landmarks", raw, city="Paris")
    with pytest.raises(BadInput, match="val.csv.*https://example.org/landmarks"):
        read_places("landmarks", raw, test="val.csv")
    (raw / "train" / "tile-2.jpg").unlink()
    with pytest.raises(BadInput, match="train.csv:3: .*https://example.org/landmarks"):
        shard(read_places("landmarks", raw), Store.open(tmp_path / "store"), "landmarks")
