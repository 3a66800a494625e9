"""Two models on the same queries: the difference and its standard error, the rule, and what was won and lost."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geostream.arrays import Csr
from geostream.errors import BadInput
from geostream.evaluation.compare import (
    SHOWN,
    changed_queries,
    check_same_gallery,
    check_z,
    compare,
    compare_ranks,
    paired_difference,
)
from geostream.evaluation.evaluate import Ranked, rank_embeddings, summed_up
from geostream.evaluation.protocols import BOTH_WAYS, PAIRED, TO_TILE, Search
from geostream.evaluation.ranks import NEVER, Ranks
from geostream.store import Store
from tests.cities import unit
from tests.evaluation.galleries import Spot, View, embedded_as, gallery_of

BITS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def ranked(wrong: list[int], gallery: int = 300, protocol: str = PAIRED) -> Ranked:
    """One positive a query, with so many wrong candidates above it."""
    n = len(wrong)
    one = Csr(np.arange(n + 1), np.arange(n, dtype=np.int32))
    none = Csr(np.zeros(n + 1, dtype=np.int64), np.zeros(0, dtype=np.int32))
    counts = np.array(wrong, dtype=np.int64)
    return Ranked(protocol, Search(TO_TILE, np.arange(n), one, none, gallery), Ranks(counts, counts))


@given(BITS)
def test_the_standard_error_is_that_of_agresti_and_min(found: list[tuple[bool, bool]]) -> None:
    """Wald's for matched proportions, after half a query is added to each of the four counts."""
    new, old = (np.array(column) for column in zip(*found, strict=True))
    n, won, lost = len(new) + 2, (new & ~old).sum() + 0.5, (old & ~new).sum() + 0.5
    wald = np.sqrt((won + lost) / n - ((won - lost) / n) ** 2) / np.sqrt(n)
    difference, error = paired_difference(new, old)
    assert error == pytest.approx(wald, rel=1e-12) and error > 0
    assert difference == pytest.approx(new.mean() - old.mean(), abs=1e-15)


@given(BITS, st.integers(0, 2**32))
def test_it_is_symmetric_and_does_not_depend_on_the_order(found: list[tuple[bool, bool]], seed: int) -> None:
    new, old = (np.array(column) for column in zip(*found, strict=True))
    shuffled = np.random.default_rng(seed).permutation(len(new))
    difference, error = paired_difference(new, old)
    assert paired_difference(old, new) == (-difference, error)
    assert paired_difference(new[shuffled], old[shuffled]) == pytest.approx((difference, error), rel=1e-12)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(["recall", "precision"]))
def test_the_standard_error_is_that_of_a_bootstrap(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    old = rng.random(1500)
    new = np.clip(old + rng.normal(0.01, 0.1, len(old)), 0, 1)
    if kind == "recall":
        old, new = (old > 0.4).astype(float), (new > 0.4).astype(float)
    _, error = paired_difference(new, old)
    drawn = rng.integers(0, len(old), (2000, len(old)))
    assert error == pytest.approx((new - old)[drawn].mean(axis=1).std(), rel=0.12)


def test_paired_is_sharper_than_two_recalls() -> None:
    rng = np.random.default_rng(0)
    old = rng.random(1000) < 0.5
    new = old ^ (rng.random(1000) < 0.02)
    unpaired = np.sqrt(new.var() / 1000 + old.var() / 1000)
    assert paired_difference(new, old)[1] < unpaired / 4


def test_won_and_lost_come_with_the_worst_first() -> None:
    before, after = np.array([0, 3, 0, 9, 0, 2]), np.array([5, 0, 0, 0, 80, 1])
    won, lost = changed_queries(before, after)
    assert won.tolist() == [3, 1] and lost.tolist() == [4, 0]


def test_every_metric_of_every_protocol_is_compared() -> None:
    old, new = [0, 4, 20, 2], [0, 0, 0, 2]
    found = compare_ranks(
        [ranked(new), ranked(new, protocol=BOTH_WAYS)], [ranked(old), ranked(old, protocol=BOTH_WAYS)]
    )
    names = ["r1", "r5", "r10", "r1pct"]
    assert [one.metric for one in found] == [*names, "hit_rate", *names, "ap"]
    assert (found[0].old, found[0].new, found[0].difference) == (0.25, 0.75, 0.5)
    assert (found[2].metric, found[2].old, found[2].new) == ("r10", 0.75, 1.0)
    assert found[-1].new > found[-1].old > 0.25


def test_other_queries_positives_or_galleries_are_refused() -> None:
    one = ranked([0, 1, 2])
    moved = replace(one.search, positives=Csr(one.search.positives.indptr, np.array([0, 2, 1], dtype=np.int32)))
    for other in (
        [ranked([0, 1])],
        [ranked([0, 1, 2], gallery=301)],
        [ranked([0, 1, 2], protocol=BOTH_WAYS)],
        [one._replace(search=moved)],
        [one, one],
        [],
    ):
        with pytest.raises(BadInput, match="gallery"):
            compare_ranks([one], other)


@pytest.mark.parametrize(
    ("queries", "won", "lost", "z", "passes"),
    [
        (400, 0, 0, 1.0, True),  # the very same answers
        (400, 0, 1, 1.0, True),  # one query: noise
        (400, 10, 14, 1.0, True),
        (400, 10, 16, 1.0, False),  # the tolerance is sqrt(27) queries, about 5.2
        (400, 10, 16, 1.645, True),
        (400, 30, 10, 0.0, True),
        (400, 10, 11, 0.0, False),
        (4, 0, 2, 1.0, False),
    ],
)
def test_the_rule(tmp_path: Path, queries: int, won: int, lost: int, z: float, passes: bool) -> None:
    store = Store.open(tmp_path)
    layout = gallery_of(store, [Spot() for _ in range(queries)], (PAIRED,))
    axes = np.eye(queries, 4, dtype=np.float32)
    axes[:, 0] += 1  # what they are does not matter here
    embeddings = embedded_as(store.child("run"), layout, unit(axes), unit(axes))
    before, after = np.zeros((2, queries), dtype=np.int64)
    before[:won], after[won : won + lost] = NEVER, 2
    made = compare(layout, [ranked(after.tolist(), queries)], [ranked(before.tolist(), queries)], embeddings, z)
    assert made.no_worse is passes
    assert (made.won, made.lost) == (won, lost)
    assert made.metrics[0].difference == pytest.approx((won - lost) / queries)
    assert made.tolerance == pytest.approx(z * made.metrics[0].standard_error)
    assert [one.place for one in made.won_queries] == list(range(min(won, SHOWN)))
    assert [one.key for one in made.lost_queries] == [f"place-{won + n:04d}" for n in range(min(lost, SHOWN))]
    assert all((one.before, one.after) == (1, 3) for one in made.lost_queries)
    assert all((one.before, one.after) == (queries, 1) for one in made.won_queries), "no rank is beyond the gallery"


@pytest.mark.parametrize("z", [-1.0, float("nan")])
def test_a_negative_tolerance_is_refused(z: float) -> None:
    with pytest.raises(BadInput, match="promote_z"):
        check_z(z)


def test_two_models_on_a_store(tmp_path: Path) -> None:
    """Each view of two is its tile's; the old model takes some for their neighbour's."""
    store = Store.open(tmp_path)
    layout = gallery_of(store, [Spot(views=(View(), View())) for _ in range(6)], (PAIRED, BOTH_WAYS))
    tiles = np.eye(6, dtype=np.float32)
    right = np.repeat(tiles, 2, axis=0)
    wrong = right.copy()
    wrong[[3, 4]] = unit(right[[3, 4]] + 2 * np.roll(tiles, 1, axis=0)[[1, 2]])
    new = embedded_as(store.child("new"), layout, right, tiles)
    old = embedded_as(store.child("old"), layout, wrong, tiles)
    check_same_gallery(new, old)
    ranks = [rank_embeddings(layout, one) for one in (new, old)]
    made = compare(layout, ranks[0], ranks[1], new, 1.0)
    assert (made.queries, made.gallery, made.won, made.lost, made.no_worse) == (12, 6, 2, 0, True)
    assert [(one.key, one.view, one.before, one.after) for one in made.won_queries] == [
        ("place-0001", 1, 2, 1),
        ("place-0002", 0, 2, 1),
    ]
    assert made.metrics[0].new == summed_up(ranks[0]).r1 == 1.0
    assert made.metrics[0].old == summed_up(ranks[1]).r1 == 10 / 12
    back = compare(layout, ranks[1], ranks[0], old, 1.0)
    assert not back.no_worse and [one.key for one in back.lost_queries] == [one.key for one in made.won_queries]


def test_embeddings_of_other_galleries_are_refused(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    axes = np.eye(4, dtype=np.float32)
    layout = gallery_of(store, [Spot() for _ in range(4)], (PAIRED,))
    fewer = gallery_of(store, [Spot() for _ in range(3)], (PAIRED,))
    new = embedded_as(store.child("new"), layout, axes, axes)
    with pytest.raises(BadInput, match="different galleries"):
        check_same_gallery(new, embedded_as(store.child("old"), fewer, axes[:3], axes[:3]))
    with pytest.raises(BadInput, match="different galleries"):
        check_same_gallery(new, replace(new, places_id="others"))
