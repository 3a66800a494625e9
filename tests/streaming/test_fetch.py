"""The fetcher: the right bytes for each step, within the schedule's memory, and damage told plainly."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from geostream.arrays import Int64
from geostream.errors import StoreError
from geostream.layout import Layout, open_layout
from geostream.layout.members import MemberTable
from geostream.store import Store
from geostream.streaming.fetch import Fetcher
from geostream.streaming.options import ReadOptions
from tests.helpers import tiny_layout, tiny_places, write_layout
from tests.scripted_server import Answer, Request, content, scripted_server


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return tiny_layout(Store.open(tmp_path), places=12, views=2)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("geostream")]


def images_of(layout: Layout) -> pa.Table:
    """The rows of the member table: the index without the places' facts."""
    return layout.members.filter(pc.not_equal(layout.members["member"], "json"))


def in_order(layout: Layout, members_a_step: int = 5) -> list[Int64]:
    rows = np.arange(images_of(layout).num_rows)
    return [rows[start : start + members_a_step] for start in range(0, len(rows), members_a_step)]


def expected(layout: Layout, row: int) -> bytes:
    member = images_of(layout).slice(row, 1).to_pylist()[0]
    return layout.store.read_range(layout.shard_names[member["shard"]], member["offset"], member["size"])


def test_every_step_gets_its_members_whatever_their_order(layout: Layout) -> None:
    shuffled = np.random.default_rng(0).permutation(images_of(layout).num_rows)
    for needed in (in_order(layout), [shuffled[i : i + 7] for i in range(0, len(shuffled), 7)]):
        with Fetcher(MemberTable.of(layout), needed) as fetcher:
            for rows, images in zip(needed, fetcher, strict=True):
                assert images == {row: expected(layout, row) for row in rows.tolist()}
            assert not fetcher._asked
        made, stats = fetcher.schedule, fetcher.stats
        assert stats.requests == made.requests and stats.bytes_fetched == made.bytes_fetched
        assert stats.bytes_used == sum(images_of(layout)["size"].to_pylist()) == made.bytes_used
        assert 0 < stats.peak_resident_bytes <= made.peak_bytes
        assert stats.resident_bytes == 0 and stats.fetch_wait_seconds > 0


def test_reading_in_order_fetches_whole_shards_and_lets_them_go(tmp_path: Path) -> None:
    layout = tiny_layout(Store.open(tmp_path), places=40, places_per_shard=2)
    rows = np.arange(images_of(layout).num_rows)[: images_of(layout).num_rows // 2]
    options = ReadOptions(prefetch=2)
    with Fetcher(MemberTable.of(layout), np.split(rows, len(rows)), options) as fetcher:
        most = max(len(fetcher._views) for _ in fetcher)
    shards = images_of(layout)["shard"].to_numpy()[rows]
    assert most <= 6 and fetcher.stats.requests == len(np.unique(shards))
    assert fetcher.stats.peak_resident_bytes <= 3 * layout.shard_sizes.max()


def test_a_short_budget_is_kept(tmp_path: Path) -> None:
    layout = tiny_layout(Store.open(tmp_path), places=40, places_per_shard=8)
    shuffled = np.random.default_rng(0).permutation(images_of(layout).num_rows)
    needed = [shuffled[i : i + 4] for i in range(0, len(shuffled), 4)]
    budget = 4 * 4 * int(images_of(layout)["size"].to_numpy().max())
    with Fetcher(MemberTable.of(layout), needed, ReadOptions(budget_bytes=budget)) as fetcher:
        for rows, images in zip(needed, fetcher, strict=True):
            assert images == {row: expected(layout, row) for row in rows.tolist()}
            assert sum(len(data) for data in fetcher._views.values()) <= budget
    assert fetcher.stats.peak_resident_bytes <= fetcher.schedule.peak_bytes <= budget == fetcher.stats.budget_bytes


def test_a_member_used_by_several_steps_counts_once(layout: Layout) -> None:
    row = np.array([0])
    with Fetcher(MemberTable.of(layout), [row, row, row]) as fetcher:
        assert [images[0] for images in fetcher] == [expected(layout, 0)] * 3
    assert fetcher.stats.requests == 1 and fetcher.stats.bytes_used == images_of(layout)["size"][0].as_py()


def test_leaving_early_frees_everything(layout: Layout) -> None:
    with Fetcher(MemberTable.of(layout), in_order(layout)) as fetcher:
        next(iter(fetcher))
    assert not fetcher._views and not fetcher._asked and fetcher.stats.resident_bytes == 0


def flip(layout: Layout, shard: int, at: int) -> None:
    data = bytearray(layout.store.read(layout.shard_names[shard]))
    data[at] ^= 1
    layout.store.write(layout.shard_names[shard], bytes(data))


def test_a_flipped_byte_leaves_out_that_member_alone(layout: Layout) -> None:
    member = images_of(layout).to_pylist()[1]
    flip(layout, member["shard"], member["offset"] + member["size"] // 2)
    with Fetcher(MemberTable.of(layout), in_order(layout)) as fetcher:
        came = [row for images in fetcher for row in images]
        assert sorted(came) == [row for row in range(images_of(layout).num_rows) if row != 1]
        assert fetcher.bad == {1: "its checksum differs from the index"}
        assert fetcher.stats.retries == {"checksum": 3}
        assert set(fetcher.fetch(MemberTable.of(layout), np.array([0, 1])).members) == {0}


@pytest.mark.parametrize("change", [-600, 512])
def test_a_shard_of_another_length_is_refused(layout: Layout, change: int) -> None:
    name = layout.shard_names[1]
    data = layout.store.read(name)
    layout.store.write(name, data[:change] if change < 0 else data + bytes(change))
    with (
        pytest.raises(StoreError, match=r"shard-00001.tar: \d+ bytes .*index .*\d+"),
        Fetcher(MemberTable.of(layout), in_order(layout)) as fetcher,
    ):
        list(fetcher)


def test_a_missing_shard_is_named(layout: Layout) -> None:
    layout.store.delete("shard-00002.tar")
    with (
        pytest.raises(StoreError, match=r"shard-00002.tar: .*gone"),
        Fetcher(MemberTable.of(layout), in_order(layout)) as fetcher,
    ):
        list(fetcher)


def test_it_reads_from_s3(s3_store: Store) -> None:
    layout = write_layout(s3_store, tiny_places())
    with Fetcher(MemberTable.of(layout), in_order(layout)) as fetcher:
        assert all(images == {row: expected(layout, row) for row in images} for images in fetcher)
    assert fetcher.stats.requests == len(layout.shard_sizes)


def test_it_reads_from_plain_http(layout: Layout) -> None:
    root = Path(layout.store.url.removesuffix("/tiny/layouts/g0"))

    def answer(request: Request) -> Answer:
        file = root / request.path.strip("/")
        return content(request, file.read_bytes()) if file.is_file() else Answer(404)

    with scripted_server(answer) as server:
        there = open_layout(Store.open(server.url), "tiny", "g0")
        with Fetcher(MemberTable.of(there), in_order(there)) as fetcher:
            assert all(images == {row: expected(layout, row) for row in images} for images in fetcher)
    assert fetcher.stats.requests == len(there.shard_sizes) and not fetcher.bad


LEFT_OPEN = """
import sys
import numpy as np
from geostream.layout import open_layout
from geostream.store import Store
from geostream.streaming.fetch import Fetcher
from geostream.layout.members import MemberTable

def members():
    with Fetcher(MemberTable.of(open_layout(Store.open(sys.argv[1]))), [np.arange(4), np.arange(4, 8)]) as fetcher:
        yield from fetcher

left_open = members()
print(len(next(left_open)))
"""


def test_a_program_that_leaves_it_open_ends(layout: Layout) -> None:
    store = layout.store.url.removesuffix("/tiny/layouts/g0")
    program = [sys.executable, "-c", LEFT_OPEN, store]
    assert subprocess.run(program, capture_output=True, timeout=60, check=True).stdout == b"4\n"
