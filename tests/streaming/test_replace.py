"""Replacement: a pair with a bad image gives way to another by the rule, its batch stays full and valid, all is told.

The rule by itself as properties over any plan; what comes of it through the loader, for each way to be bad.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from geostream.arrays import Csr, Int64
from geostream.errors import StoreError
from geostream.images import Pixels
from geostream.layout import Layout
from geostream.planning.plan import EpochPlan
from geostream.store import Store
from geostream.streaming import transport
from geostream.streaming.dataset import plan_dataset
from geostream.streaming.decode import decode_image
from geostream.streaming.loader import Loader
from geostream.streaming.options import ReadOptions
from geostream.streaming.pipeline import Batch
from geostream.streaming.replace import Substitutes
from geostream.streaming.shared import PlanBatches, SharedRows
from geostream.streaming.stats import LISTED, Replaced, StreamStats
from tests.helpers import TinyPlace, member_of, tiny_places, write_layout
from tests.streaming.plans import SIZES, as_in_a_worker, assert_as_planned, assert_same, hand_made_plan

Pair = tuple[int, int]


@st.composite
def substitutes(draw: st.DrawFn) -> Substitutes:
    """Any pairs in any batches; two places exclude one another or don't."""
    places = draw(st.integers(1, 9))
    batch_size = draw(st.integers(1, 4))
    n = draw(st.integers(1, 6)) * batch_size
    known = [(place, view) for place in range(places) for view in range(draw(st.integers(1, 4)))]
    pairs = np.array(draw(st.permutations(known)), dtype=np.int64)
    n = min(n, len(pairs) // batch_size * batch_size)
    couples = draw(st.sets(st.tuples(st.integers(0, places - 1), st.integers(0, places - 1)), max_size=8))
    both_ways = couples | {(b, a) for a, b in couples}
    rows = [sorted(b for a, b in both_ways if a == place != b) for place in range(places)]
    excluded = Csr(
        np.cumsum([0, *map(len, rows)]).astype(np.int64), np.array([b for row in rows for b in row], dtype=np.int32)
    )
    return Substitutes(plan_batches(pairs[:n].reshape(-1, batch_size, 2), pairs[n:]), excluded)


def plan_batches(batches: Int64, left_out: Int64) -> PlanBatches:
    """Pairs as (place, view); their id is 10 times the place and the view."""

    def columns(pairs: Int64) -> tuple[SharedRows[np.int32], SharedRows[np.int16], SharedRows[np.int32]]:
        place, view = pairs[..., 0], pairs[..., 1]
        pair = 10 * place + view
        return SharedRows(place.astype(np.int32)), SharedRows(view.astype(np.int16)), SharedRows(pair.astype(np.int32))

    return PlanBatches(*columns(batches), *columns(left_out))


def pairs_of(rule: Substitutes) -> tuple[list[list[Pair]], list[Pair]]:
    """Those of each batch, and those left out."""
    plan = rule.plan
    batches = [list(zip(plan.place[step].tolist(), plan.view[step].tolist(), strict=True)) for step in range(len(plan))]
    every = range(len(plan.left_out_pair))
    return batches, [(int(plan.left_out_place[at]), int(plan.left_out_view[at])) for at in every]


@given(substitutes(), st.data())
def test_who_may_stand_in_and_in_which_order(rule: Substitutes, data: st.DataObject) -> None:
    batches, left_out = pairs_of(rule)
    step = data.draw(st.integers(0, max(len(batches) - 1, 0)))
    batch = {place for place, _ in batches[step]} if batches else set()
    batch |= data.draw(st.sets(st.integers(0, 8), max_size=2))  # who stands in already
    candidates = list(rule.candidates(step, batch))
    found = [(place, view) for place, view, _ in candidates]

    def fits(pair: Pair) -> bool:
        return pair[0] not in batch and not any(
            pair[0] in rule.excluded.row(place) or place in rule.excluded.row(pair[0])
            for place in batch
            if place < len(rule.excluded.indptr) - 1
        )

    assert all(pair == 10 * place + view for place, view, pair in candidates)
    assert len(set(found)) == len(found)
    elsewhere = [pair for other, pairs in enumerate(batches) if other != step for pair in pairs]
    assert set(found) == {pair for pair in left_out + elsewhere if fits(pair)}
    spare = [pair for pair in left_out if fits(pair)]
    assert set(found[: len(spare)]) == set(spare)
    halfway = {number: (number - step - len(batches) // 2) % len(batches) for number in range(len(batches))}
    number_of = {pair: number for number, pairs in enumerate(batches) for pair in pairs}
    distances = [halfway[number_of[pair]] for pair in found[len(spare) :]]
    assert distances == sorted(distances)
    assert list(rule.candidates(step, batch)) == candidates


@given(substitutes(), st.data())
def test_the_rule_is_that_of_whole_lists(rule: Substitutes, data: st.DataObject) -> None:
    """A worker reads candidates one by one from a file; they are those of lists of all pairs, as plans were trained."""
    batches, left_out = pairs_of(rule)
    step = data.draw(st.integers(0, max(len(batches) - 1, 0)))
    batch = {place for place, _ in batches[step]} if batches else set()
    turn = step % max(len(left_out), 1)
    wanted = left_out[turn:] + left_out[:turn]
    for away in range(len(batches)):
        other = (step + len(batches) // 2 + away) % len(batches)
        wanted += batches[other] if other != step else []
    wanted = [
        (place, view)
        for place, view in wanted
        if place not in batch and batch.isdisjoint(rule.excluded.row(place).tolist())
    ]
    for told in (rule, replace(rule, plan=as_in_a_worker(rule.plan))):
        assert [(place, view) for place, view, _ in told.candidates(step, batch)] == wanted


def test_left_out_pairs_take_turns() -> None:
    """Else one of them would stand in for all that is bad, and be seen as often."""
    empty = Csr(np.zeros(21, dtype=np.int64), np.zeros(0, dtype=np.int32))
    pairs = np.stack([np.arange(20), np.zeros(20, np.int64)], axis=1)
    rule = Substitutes(plan_batches(pairs[:16].reshape(4, 4, 2), pairs[16:]), empty)
    assert {next(rule.candidates(step, set(rule.plan.place[step].tolist())))[:2] for step in range(4)} == {
        (place, 0) for place in range(16, 20)
    }


@dataclass(frozen=True)
class Epoch:
    """A layout with damage, a plan of it, and what the plan would have come to without."""

    layout: Layout
    plan: EpochPlan
    undisturbed: list[Batch]

    def read(self, *, workers: int = 0, threads: int = 1, limit: float = 0.01) -> tuple[list[Batch], StreamStats]:
        dataset = plan_dataset(self.layout, self.plan, SIZES, options=ReadOptions(replaced_limit=limit))
        with Loader(dataset, workers=workers, threads=threads) as loader:
            return list(loader), loader.stats


def make(folder: Path, *, batch_size: int = 5, flipped: Sequence[Pair] = (), cut: Sequence[Pair] = ()) -> Epoch:
    """24 places of 2 views, whose members (place, view; the tile is view -1) are bad.

    ``flipped``: in the stored shard, after the commit. ``cut``: sharded like that, with a checksum that is right.
    """

    def name(view: int) -> str:
        return "tile.jpg" if view < 0 else f"view-{view:02d}.jpg"

    def places(cut: Sequence[Pair]) -> list[TinyPlace]:
        made = tiny_places(places=24, views=2)
        for place, view in cut:
            made[place].images[name(view)] = made[place].images[name(view)][:-200]
        return made

    whole = write_layout(Store.open(folder / "whole"), places(()), places_per_shard=3)
    plan = hand_made_plan(whole, lanes=2, batch_size=batch_size)
    with Loader(plan_dataset(whole, plan, SIZES)) as loader:
        undisturbed = list(loader)
    assert_as_planned(undisturbed, plan, whole)
    layout = write_layout(Store.open(folder / "damaged"), places(cut), places_per_shard=3)
    for member in layout.members.to_pylist():
        if (member["place"], member["member"]) in [(place, name(view)) for place, view in flipped]:
            shard = layout.shard_names[member["shard"]]
            data = bytearray(layout.store.read(shard))
            data[member["offset"] + member["size"] // 2] ^= 1
            layout.store.write(shard, bytes(data))
    return Epoch(layout, hand_made_plan(layout, lanes=2, batch_size=batch_size), undisturbed)


def assert_replaced(epoch: Epoch, batches: list[Batch], stats: StreamStats, bad: list[Pair]) -> None:
    """All as planned but for the ``bad`` pairs; each of their batches is full and valid, and its replacement listed."""
    pairs, excluded = epoch.layout.pairs("train"), epoch.layout.excluded("train")
    keys = epoch.layout.keys
    listed = {(one.step, one.pair): one for one in stats.replaced}
    assert stats.replaced_pairs == len(stats.replaced) == len(listed) == len(bad)
    assert [batch.step for batch in batches] == list(range(epoch.plan.n_batches))
    for batch, whole in zip(batches, epoch.undisturbed, strict=True):
        ids = batch.tensors["pair"].numpy()
        places = pairs.place[ids].tolist()
        assert len(set(places)) == epoch.plan.batch_size
        assert all(set(places).isdisjoint(excluded.row(place).tolist()) for place in places)
        for row, planned in enumerate(whole.tensors["pair"].tolist()):
            pair = (int(pairs.place[planned]), int(pairs.view[planned]))
            if pair in bad:
                told = listed[batch.step, f"{keys[pair[0]]} view-{pair[1]:02d}.jpg"]
                place, view = int(pairs.place[ids[row]]), int(pairs.view[ids[row]])
                assert told.stand_in == f"{keys[place]} view-{view:02d}.jpg"
                for kind, number in (("tile", None), ("view", view)):
                    pixels = batch.tensors[kind][row].permute(1, 2, 0).numpy()
                    assert np.array_equal(pixels, stored(epoch.layout, place, number))
            else:
                assert ids[row] == planned
                for kind in ("tile", "view"):
                    assert torch.equal(batch.tensors[kind][row], whole.tensors[kind][row])


def stored(layout: Layout, place: int, view: int | None) -> Pixels:
    member = member_of(layout, place, view)
    data = layout.store.read_range(layout.shard_names[member["shard"]], member["offset"], member["size"])
    size = SIZES.tile if member["member"] == "tile.jpg" else SIZES.view
    return decode_image(data, np.empty((*size, 3), np.uint8))


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FIRST_PAUSE", 0.01)


CHECKSUM, UNDECODABLE = ".*checksum.*", r".*JPEG \(.+\)"
BAD: dict[str, tuple[dict[str, Any], list[Pair], str, str]] = {
    "a view's byte is inverted in the shard": ({"flipped": [(6, 1)]}, [(6, 1)], "view-01.jpg", CHECKSUM),
    "a view was sharded cut off": ({"cut": [(6, 1)]}, [(6, 1)], "view-01.jpg", UNDECODABLE),
    "two views share a bad tile": ({"flipped": [(6, -1)]}, [(6, 0), (6, 1)], "tile.jpg", CHECKSUM),
    "two views share a tile cut off": ({"cut": [(6, -1)]}, [(6, 0), (6, 1)], "tile.jpg", UNDECODABLE),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_pair_is_replaced_the_same_way_whoever_makes_the_batch(tmp_path: Path, case: str) -> None:
    damage, bad, member, reason = BAD[case]
    epoch = make(tmp_path, **damage)
    left_out = {
        f"{epoch.layout.keys[place]} view-{view:02d}.jpg"
        for place, view in zip(epoch.plan.left_out_place.tolist(), epoch.plan.left_out_view.tolist(), strict=True)
    }
    alone, stats = epoch.read(limit=0.05)
    assert_replaced(epoch, alone, stats, bad)
    for one in stats.replaced:
        assert one.member == f"{member} of place alpha-0006 in {epoch.layout.store.url}/shard-00002.tar"
        assert re.fullmatch(reason, one.reason)
        assert one.stand_in in left_out
    assert stats.retries == ({} if "cut" in damage else {"checksum": 3})
    assert json.loads(json.dumps(stats.as_dict()))["replaced"] == [asdict(one) for one in stats.replaced]
    for workers, threads in ((0, 2), (1, 1)):
        others, of_others = epoch.read(workers=workers, threads=threads, limit=0.05)
        assert_same(alone, others)
        assert of_others.replaced == stats.replaced


def test_where_no_pair_is_left_out_one_stands_in_from_half_an_epoch_away(tmp_path: Path) -> None:
    epoch = make(tmp_path, batch_size=4, flipped=[(6, 1)])
    assert not len(epoch.plan.left_out_place)
    batches, stats = epoch.read()
    assert_replaced(epoch, batches, stats, [(6, 1)])
    step, row = np.argwhere((epoch.plan.place == 6) & (epoch.plan.view == 1))[0].tolist()
    # The batch half an epoch away has the same places, with their other view: the next one helps.
    source = (step + epoch.plan.n_batches // 2 + 1) % epoch.plan.n_batches
    assert batches[step].tensors["pair"][row] == epoch.undisturbed[source].tensors["pair"][0]


def test_who_is_bad_himself_does_not_stand_in(tmp_path: Path) -> None:
    whole = make(tmp_path / "1", flipped=[(6, 1)])
    first = whole.read()[1].replaced[0].stand_in.split()
    place, view = whole.layout.keys.index(first[0]), int(first[1][5:7])
    epoch = make(tmp_path / "2", flipped=[(6, 1)], cut=[(place, view)])
    batches, stats = epoch.read()
    assert_replaced(epoch, batches, stats, [(6, 1)])
    assert stats.replaced[0].stand_in.split() != first


def test_two_bad_pairs_of_one_batch_are_replaced_by_two(tmp_path: Path) -> None:
    plan = make(tmp_path / "plan").plan
    bad = list(zip(plan.place[3][:2].tolist(), plan.view[3][:2].tolist(), strict=True))
    epoch = make(tmp_path, flipped=bad[:1], cut=bad[1:])
    batches, stats = epoch.read(limit=0.05)
    assert_replaced(epoch, batches, stats, bad)


def test_none_can_stand_in(tmp_path: Path) -> None:
    """Two batches of three, and each place of the other is next to one of this."""
    places = tiny_places(places=6)
    places[2].images["view-00.jpg"] = places[2].images["view-00.jpg"][:-200]
    layout = write_layout(Store.open(tmp_path), places)
    wanted = (
        rf"view-00\.jpg of place alpha-0002 in {re.escape(layout.store.url)}/shard-00000\.tar: {UNDECODABLE}; "
        "and no other pair can stand in for it; restore the shard"
    )
    with (
        Loader(plan_dataset(layout, hand_made_plan(layout), SIZES)) as loader,
        pytest.raises(StoreError) as error,
    ):
        list(loader)
    assert re.fullmatch(wanted, str(error.value))


@pytest.mark.parametrize("workers", [0, 1])
def test_more_than_may_be_replaced(tmp_path: Path, workers: int) -> None:
    bad = [(3, 0), (6, 1), (15, 0)]
    epoch = make(tmp_path, flipped=bad)
    with pytest.raises(StoreError) as error:
        epoch.read(workers=workers, limit=0.05)  # of 40 pairs
    assert re.fullmatch(
        rf"view-0\d\.jpg of place alpha-\d+ in {re.escape(epoch.layout.store.url)}/shard-\d+\.tar: {CHECKSUM}; "
        r"3 pairs are damaged, more than may be replaced \(replaced_limit 0\.05\); "
        "see what is wrong with: geostream verify",
        str(error.value),
    )
    batches, stats = epoch.read(workers=workers, limit=0.075)
    assert_replaced(epoch, batches, stats, bad)


def test_one_may_be_replaced_whatever_the_limit(tmp_path: Path) -> None:
    epoch = make(tmp_path / "1", flipped=[(6, 1)])
    batches, stats = epoch.read(limit=0)
    assert_replaced(epoch, batches, stats, [(6, 1)])
    with pytest.raises(StoreError, match=r"2 pairs .*\(replaced_limit 0\)"):
        make(tmp_path / "2", flipped=[(6, 1), (3, 0)]).read(limit=0)


def test_all_are_counted_and_the_first_are_listed() -> None:
    parts = [StreamStats(), StreamStats()]
    for part in parts:
        for step in range(LISTED + 5):
            part.count_replaced(Replaced(step, "a", "b", "c", "d"))
        assert part.replaced_pairs == LISTED + 5 and len(part.replaced) == LISTED
    both = StreamStats.total(parts)
    assert both.replaced_pairs == 2 * LISTED + 10 and len(both.replaced) == LISTED
    assert StreamStats.from_dict(json.loads(json.dumps(both.as_dict()))) == both
