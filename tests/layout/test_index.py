"""A large index: read by columns and row groups, it says the same as the whole, and damage is told."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from geostream.arrays import Csr
from geostream.errors import BadInput, StoreError
from geostream.layout import Layout, index, open_layout
from geostream.layout.members import MemberTable, read_image
from geostream.store import Store, store
from tests.helpers import tiny_layout

ASKED: dict[str, Callable[[Layout], Any]] = {
    "position": lambda layout: layout.position,
    "area": lambda layout: layout.area,
    "keys": lambda layout: np.array(layout.keys),
    "shard of each place": lambda layout: layout.shard_of_place,
    "training pairs": lambda layout: layout.pairs("train"),
    "test pairs": lambda layout: layout.pairs("test"),
    "references": lambda layout: layout.references("test"),
    "semi-positives": lambda layout: layout.semi_positives("train"),
    "excluded": lambda layout: layout.excluded("train"),
}


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups of seven rows, and no table that is read as a whole."""
    monkeypatch.setattr(store, "ROW_GROUP", 7)
    monkeypatch.setattr(index, "WHOLE_ROWS", 0)


def arrays(found: Any) -> list[Any]:
    return [part.tolist() for part in found] if isinstance(found, tuple | Csr) else [found.tolist()]


@pytest.mark.usefixtures("in_parts")
def test_parts_say_the_same_as_the_whole(s3_store: Store) -> None:
    whole = tiny_layout(s3_store, places=30, views=2)
    layout = open_layout(s3_store)
    for name, ask in ASKED.items():
        assert arrays(ask(layout)) == arrays(ask(whole)), name
    assert [layout.key(place) for place in (0, 6, 7, 29)] == [whole.keys[place] for place in (0, 6, 7, 29)]
    assert layout.index.__dict__.keys().isdisjoint({"tables"}), "no table was read as a whole"


@pytest.mark.usefixtures("in_parts")
def test_members_of_some_shards(tmp_path: Path) -> None:
    whole = tiny_layout(Store.open(tmp_path), places=30, views=2)
    layout, every = open_layout(Store.open(tmp_path)), MemberTable.of(whole)
    some = MemberTable.of(layout, np.array([4, 1, 2], np.int32))
    rows = np.flatnonzero(np.isin(every.extents.shard, [1, 2, 4]))
    assert arrays(some.extents) == [column[rows].tolist() for column in every.extents]
    assert some.crc32c.tolist() == every.crc32c[rows].tolist()
    assert [some.describe(row) for row in range(len(rows))] == [every.describe(row) for row in rows.tolist()]
    places = np.flatnonzero(whole.shard_of_place == 2).astype(np.int32)
    assert some.place[some.rows(places)].tolist() == places.tolist()
    with pytest.raises(BadInput, match=whole.keys[0]):
        some.rows(np.array([0], np.int32))
    assert read_image(layout, 7, 1) == read_image(whole, 7, 1)


@pytest.mark.usefixtures("in_parts")
def test_opening_reads_kilobytes_and_a_copy_takes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_layout(Store.open(tmp_path), places=30)
    read: list[str] = []
    whole = Store.read

    def watched(self: Store, path: str) -> bytes:
        read.append(path)
        return whole(self, path)

    monkeypatch.setattr(Store, "read", watched)
    layout = open_layout(Store.open(tmp_path), "tiny", "g0")
    assert read == ["layout.json"]
    before = len(pickle.dumps(layout))
    _ = layout.shard_of_place, layout.position, layout.pairs("train")
    assert len(pickle.dumps(layout)) == before


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("file", ["places.parquet", "members.parquet"])
def test_damage_in_a_part_is_told(tmp_path: Path, file: str) -> None:
    layout = tiny_layout(Store.open(tmp_path), places=30)
    path = Path(layout.store.url) / file
    data = bytearray(path.read_bytes())
    data[40] ^= 0xFF  # in the first column's first page
    path.write_bytes(data)
    reopened = open_layout(Store.open(tmp_path))
    with pytest.raises(StoreError, match=rf"{file}.*restore"):
        for ask in ASKED.values():
            ask(reopened)
        MemberTable.of(reopened)
    path.unlink()
    with pytest.raises(StoreError, match=rf"{file}.*restore"):
        _ = open_layout(Store.open(tmp_path)).index.read(file, ["place" if "members" in file else "key"])
