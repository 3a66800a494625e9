from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.order import cut, grid, hilbert_index, storage_order


def test_hilbert_visits_every_cell_once_by_single_steps() -> None:
    bits = 5
    cells = np.stack(np.meshgrid(*[np.arange(2**bits)] * 2), axis=-1).reshape(-1, 2)
    index = hilbert_index(cells, bits)
    assert sorted(index) == list(range(4**bits))
    steps = np.abs(np.diff(cells[np.argsort(index)], axis=0)).sum(axis=1)
    assert (steps == 1).all()


def test_grid_has_one_scale_in_metres() -> None:
    at = np.array(
        [[60.0, 10.0], [60.001, 10.0], [60.0, 10.002]]
    )  # 0.002 degrees of longitude are 0.001 of latitude there
    cells = grid(at, latlon=True)
    assert abs(cells[1, 0] - cells[2, 1]) <= 2
    assert cells.min() == 0 and cells.max() == 2**16 - 1
    assert (grid(np.array([[5.0, 5.0]]), latlon=True) == 0).all()  # a single spot


positions = st.one_of(st.just(np.nan), st.floats(-80, 80))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), positions, positions), min_size=1, max_size=60))
def test_storage_order_keeps_groups_and_areas_together(rows: list[tuple[int, int, float, float]]) -> None:
    group, area = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    position = np.array([r[2:] for r in rows])
    order = storage_order(group, area, position, latlon=True)
    assert sorted(order) == list(range(len(rows)))
    together = [(group[row], area[row]) for row in order]
    assert together == sorted(together)
    unknown = np.isnan(position).any(axis=1)
    for one in set(together):
        rows_of = [row for row in order if (group[row], area[row]) == one]
        assert [unknown[row] for row in rows_of] == sorted(unknown[row] for row in rows_of)
        assert [row for row in rows_of if unknown[row]] == sorted(row for row in rows_of if unknown[row])


def test_neighbours_in_space_are_near_in_order() -> None:
    rng = np.random.default_rng(0)
    position = rng.uniform(40, 40.05, (2000, 2))
    zero = np.zeros(2000, dtype=np.int64)
    walk = position[storage_order(zero, zero, position, latlon=False)]
    step = np.linalg.norm(np.diff(walk, axis=0), axis=1).mean()
    assert step < 1.2 * 0.05 / np.sqrt(2000)  # about the spacing of the points; in random order it is 23 times that


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.floats(1, 100)), min_size=1, max_size=80),
    st.integers(1, 3000),
)
def test_cut_is_a_partition_near_the_target(rows: list[tuple[int, float]], target: int) -> None:
    rows = sorted(rows, key=lambda row: row[0])
    group, size = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    shards = cut(size, group, target)
    assert np.concatenate(shards).tolist() == list(range(len(rows)))
    assert all(len(shard) for shard in shards)
    for shard in shards:
        assert len(set(group[shard])) == 1
        assert size[shard].sum() <= target + size[shard].max()


def test_cut_leaves_no_small_remainder() -> None:
    shards = cut(np.ones(1001), np.zeros(1001, dtype=np.int64), 100)
    assert len(shards) == 11
    assert {len(shard) for shard in shards} == {91}
