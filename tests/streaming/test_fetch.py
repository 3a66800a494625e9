"""The fetcher: the right bytes for each step, within the schedule's memory, and damage told plainly."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from geostream.errors import StoreError
from geostream.layout import Int64, Layout
from geostream.store import Store
from geostream.streaming.fetch import Fetcher, MemberTable
from tests.helpers import tiny_layout, tiny_places, write_layout


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return tiny_layout(Store.open(tmp_path), places=12, views=2)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("geostream")]


def in_order(layout: Layout, members_a_step: int = 5) -> list[Int64]:
    rows = np.arange(layout.members.num_rows)
    return [rows[start : start + members_a_step] for start in range(0, len(rows), members_a_step)]


def expected(layout: Layout, row: int) -> bytes:
    member = layout.members.slice(row, 1).to_pylist()[0]
    return layout.store.read_range(layout.shard_names[member["shard"]], member["offset"], member["size"])


def test_every_step_gets_its_members_whatever_their_order(layout: Layout) -> None:
    shuffled = np.random.default_rng(0).permutation(layout.members.num_rows)
    for needed in (in_order(layout), [shuffled[i : i + 7] for i in range(0, len(shuffled), 7)]):
        with Fetcher(MemberTable.of(layout), needed) as fetcher:
            for rows, images in zip(needed, fetcher, strict=True):
                assert images == {row: expected(layout, row) for row in rows.tolist()}
            assert not fetcher._resident and not fetcher._requested
        assert fetcher.stats.requests == len(layout.shard_sizes)
        assert fetcher.stats.bytes_fetched == layout.shard_sizes.sum() == fetcher.schedule.bytes_fetched
        assert fetcher.stats.bytes_used == sum(layout.members["size"].to_pylist()) == fetcher.schedule.bytes_used
        assert fetcher.stats.peak_resident_bytes <= fetcher.schedule.peak_bytes


def test_reading_in_order_lets_shards_go_and_skips_those_not_needed(tmp_path: Path) -> None:
    layout = tiny_layout(Store.open(tmp_path), places=40, places_per_shard=2)
    rows = np.arange(layout.members.num_rows)[: layout.members.num_rows // 2]
    with Fetcher(MemberTable.of(layout), np.split(rows, len(rows))) as fetcher:
        most = max(len(fetcher._resident) for _ in fetcher)
    assert most == 1
    assert fetcher.stats.requests < len(layout.shard_sizes) * 0.6
    assert fetcher.stats.peak_resident_bytes <= 3 * layout.shard_sizes.max()  # one in use, two on their way


def test_a_member_used_by_several_steps_counts_once(layout: Layout) -> None:
    row = np.array([0])
    with Fetcher(MemberTable.of(layout), [row, row, row]) as fetcher:
        assert [images[0] for images in fetcher] == [expected(layout, 0)] * 3
    assert fetcher.stats.requests == 1 and fetcher.stats.bytes_used == layout.members["size"][0].as_py()


def test_leaving_early_frees_everything(layout: Layout) -> None:
    with Fetcher(MemberTable.of(layout), in_order(layout)) as fetcher:
        next(iter(fetcher))
    assert not fetcher._resident and not fetcher._requested


def flip(layout: Layout, shard: int, at: int) -> None:
    data = bytearray(layout.store.read(layout.shard_names[shard]))
    data[at] ^= 1
    layout.store.write(layout.shard_names[shard], bytes(data))


def test_a_flipped_byte_names_shard_and_member(layout: Layout) -> None:
    member = layout.members.to_pylist()[1]
    flip(layout, member["shard"], member["offset"] + member["size"] // 2)
    with (
        pytest.raises(StoreError, match=r"view-00.jpg of place alpha-0000 in .*shard-00000.tar: checksum"),
        Fetcher(MemberTable.of(layout), in_order(layout)) as fetcher,
    ):
        list(fetcher)


@pytest.mark.parametrize("change", [-600, 512])
def test_a_shard_of_another_length_is_refused(layout: Layout, change: int) -> None:
    name = layout.shard_names[1]
    data = layout.store.read(name)
    layout.store.write(name, data[:change] if change < 0 else data + bytes(change))
    with (
        pytest.raises(StoreError, match=r"shard-00001.tar: \d+ bytes where the index says \d+"),
        Fetcher(MemberTable.of(layout), in_order(layout)) as fetcher,
    ):
        list(fetcher)


def test_a_missing_shard_is_named(layout: Layout) -> None:
    layout.store.delete("shard-00002.tar")
    with (
        pytest.raises(StoreError, match=r"shard-00002.tar: the layout names this shard, but it is gone"),
        Fetcher(MemberTable.of(layout), in_order(layout)) as fetcher,
    ):
        list(fetcher)


def test_it_reads_from_s3(s3_store: Store) -> None:
    layout = write_layout(s3_store, tiny_places())
    with Fetcher(MemberTable.of(layout), in_order(layout)) as fetcher:
        assert all(images == {row: expected(layout, row) for row in images} for images in fetcher)
    assert fetcher.stats.requests == len(layout.shard_sizes)
