"""Exact resume: whoever goes on after a kill, with however many ranks and workers, makes the same batches."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from geostream.errors import BadInput, StaleArtefact
from geostream.layout import Layout
from geostream.planning.plan import EpochPlan, save_plan
from geostream.store import Store
from geostream.streaming.loader import Loader
from geostream.streaming.pipeline import Batch
from geostream.streaming.stats import StreamStats
from infra.process import Child, end, spawn
from tests.conftest import ROOT
from tests.helpers import tiny_layout, tiny_places, write_layout
from tests.streaming.plans import hand_made_plan
from tests.streaming.resume_worker import EPOCH, HANG, RUN, Job, dataset_of, hash_of

LANES = 4
SHARES = [(1, 0), (2, 0), (4, 0), (1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)]  # (ranks, workers) that divide it
State = dict[str, Any]


@dataclass(frozen=True)
class Stream:
    """A stored layout and plan, and the hash of each of its batches as one reader makes them without a break."""

    store: Store
    layout: Layout
    plan: EpochPlan
    hashes: list[str]
    stats: StreamStats

    @classmethod
    def of(cls, store: Store, **kind: Any) -> Stream:
        layout = tiny_layout(store, places_per_shard=5, places=160, test_places=0, distractors=0, **kind)
        return cls.with_plan(store, layout)

    @classmethod
    def with_plan(cls, store: Store, layout: Layout, **options: Any) -> Stream:
        plan = hand_made_plan(layout, LANES, batch_size=2, epoch=EPOCH)
        save_plan(store.child(RUN), plan)
        batches = list(Loader(dataset_of(layout, plan, **options)))
        assert [batch.step for batch in batches] == list(range(plan.n_batches))
        return cls(store, layout, plan, [hash_of(batch) for batch in batches], batches[-1].stats)

    def loader(self, rank: int = 0, ranks: int = 1, state: State | None = None, **options: Any) -> Loader:
        loader = Loader(dataset_of(self.layout, self.plan, rank, ranks, **options), threads=1)
        if state is not None:
            loader.load_state_dict(state)
        return loader

    def at(self, cursor: int) -> State:
        return {"plan": self.plan.hash, "cursor": cursor}


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    return Stream.of(Store.open(tmp_path_factory.mktemp("store")))


# real processes


@dataclass(frozen=True)
class Group:
    """Ranks that run, or ran, as processes of their own."""

    stream: Stream
    job: Job
    child: Child
    meeting: TCPStore | None

    @classmethod
    def start(
        cls, stream: Stream, folder: Path, ranks: int, workers: int, state: State | None = None, **job: Any
    ) -> Group:
        """``state``: where they begin. They meet after every step unless ``together=False``."""
        meeting = (
            TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if job.pop("together", True) else None
        )
        made = Job(stream.store.url, str(folder), ranks, workers, state, port=meeting.port if meeting else None, **job)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.streaming.resume_worker", made.as_json()]
        return cls(stream, made, spawn(command, environment=environment, log=folder / "log"), meeting)

    @property
    def begin(self) -> int:
        return int(self.job.state["cursor"]) if self.job.state else 0

    def taken(self) -> list[list[tuple[int, str]]]:
        """(step, hash) of the batches that each rank took, in its order."""
        found = []
        for rank in range(self.job.ranks):
            path = Path(self.job.folder, f"rank-{rank}.txt")
            lines = path.read_text().splitlines() if path.exists() else []
            found.append([(int(step), digest) for step, digest in map(str.split, lines)])
        return found

    def count(self) -> int:
        return sum(map(len, self.taken()))

    def states(self) -> list[State]:
        return [json.loads(path.read_text()) for path in sorted(Path(self.job.folder).glob("state-*.json"))]

    def kill(self) -> None:
        """SIGKILL to all ranks, not to what they started."""
        for rank in psutil.Process(self.child.pid).children():
            rank.kill()
        assert self.exits() == [-signal.SIGKILL] * self.job.ranks, self.child.log_tail(40)

    def exits(self) -> list[int]:
        """What the ranks ended with, once they have."""
        told = Path(self.job.folder, "exits.json")
        self.wait(lambda: told.exists() and told.stat().st_size > 0)
        exits: list[int] = json.loads(told.read_text())
        return exits

    def wait(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HANG.total_seconds() + 60
        while not ready():
            assert self.child.running() or ready(), self.child.log_tail(40)
            assert time.monotonic() < deadline, f"{self.taken()}\n{self.child.log_tail(40)}"
            time.sleep(0.005)

    def check(self, until: int) -> None:
        """Each rank took its steps in order, without a hole, as one reader makes them; together all up to ``until``."""
        for rank, batches in enumerate(self.taken()):
            steps = [step for step, _ in batches]
            assert steps == [self.begin + rank + self.job.ranks * i for i in range(len(steps))]
            wrong = [step for step, digest in batches if digest != self.stream.hashes[step]]
            assert not wrong, f"rank {rank} of {self.job.ranks} made other batches at steps {wrong}"
        merged = sorted(step for batches in self.taken() for step, _ in batches)
        assert merged[: until - self.begin] == list(range(self.begin, until))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Group]]:
    """``Group.start`` in a folder of the group's own; whatever still runs of it is ended with the module."""
    groups: list[Group] = []

    def one(stream: Stream, ranks: int, workers: int, state: State | None = None, **job: Any) -> Group:
        folder = tmp_path_factory.mktemp("group")
        groups.append(Group.start(stream, folder, ranks, workers, state, **job))
        return groups[-1]

    yield one
    for group in groups:
        end(group.child)


def cut_off(group: Group, batches: int) -> State:
    """Kill the group when it has taken so many batches; its stored state."""
    group.wait(lambda: group.count() >= batches)
    group.kill()
    states = group.states()
    assert len(states) == (1 if group.job.port else group.job.ranks)
    # Ranks that never met are not equally far: the one farthest behind says how far all are.
    state = min(states, key=lambda one: int(one["cursor"]))
    assert group.begin < state["cursor"] < len(group.stream.hashes), "killed too early or too late"
    group.check(until=state["cursor"])
    return state


def finish(group: Group) -> None:
    """Wait for the group; it has taken everything to the plan's end."""
    assert group.exits() == [0] * group.job.ranks, group.child.log_tail(40)
    group.check(until=len(group.stream.hashes))
    assert group.count() == len(group.stream.hashes) - group.begin
    if group.job.port:
        assert group.states() == [group.stream.at(len(group.stream.hashes))]


def kill_and_resume(
    start: Callable[..., Group], stream: Stream, shares: list[tuple[int, int]], seed: int, most: int
) -> None:
    """A stream taken by one group after the other, each but the last killed somewhere in its first ``most`` batches.

    States are stored where every lane is equally far, so that any number of ranks goes on in even rounds.
    """
    chance = random.Random(seed)
    state: State | None = None
    for ranks, workers in shares[:-1]:
        batches = chance.randint(2 * LANES, most)
        hold = (state["cursor"] if state else 0) + batches + LANES
        state = cut_off(start(stream, ranks, workers, state, every=LANES, hold=hold), batches)
    finish(start(stream, *shares[-1], state, every=LANES))


@pytest.fixture(scope="module")
def cut(start: Callable[..., Group], stream: Stream) -> tuple[Group, State]:
    """Two ranks with a loader worker each, killed; and where they stood."""
    batches = random.Random(1).randint(2 * LANES, 60)
    group = start(stream, 2, 1, every=LANES, hold=batches + LANES)
    return group, cut_off(group, batches)


def test_ranks_and_workers_that_were_killed_go_on_as_other_ranks(
    start: Callable[..., Group], stream: Stream, cut: tuple[Group, State]
) -> None:
    _, state = cut
    finish(start(stream, 4, 0, state, every=LANES))


def test_killed_ranks_leave_no_loader_processes(cut: tuple[Group, State]) -> None:
    group, _ = cut
    deadline = time.monotonic() + 20
    while (left := group.child.family()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


@pytest.mark.slow
def test_ranks_reading_from_s3_are_killed(start: Callable[..., Group], s3_store: Store) -> None:
    stream = Stream.of(s3_store)
    batches = random.Random(2).randint(8, 60)
    state = cut_off(start(stream, 2, 0, hold=batches + 8), batches)
    assert [hash_of(batch) for batch in stream.loader(state=state)] == stream.hashes[state["cursor"] :]


@pytest.mark.slow
def test_ranks_that_never_meet_are_cut_off_at_odd_places(start: Callable[..., Group], stream: Stream) -> None:
    """Here nothing keeps the ranks equally far, and neither is what is left a multiple of anything."""
    batches = random.Random(3).randint(12, 50)
    state = cut_off(start(stream, 2, 0, stream.at(3), together=False, hold=batches + 9), batches)
    assert state["cursor"] % 2 == 1
    for ranks in (1, 2, 4):
        taken = {batch.step: hash_of(batch) for rank in range(ranks) for batch in stream.loader(rank, ranks, state)}
        assert sorted(taken) == list(range(state["cursor"], stream.plan.n_batches))
        assert all(stream.hashes[step] == digest for step, digest in taken.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "shares",
    [
        [(1, 4), (2, 2), (4, 0), (2, 0), (1, 0)],
        [(1, 0), (4, 1), (1, 2), (2, 1), (1, 4)],
        [(2, 2), (1, 1), (4, 0), (1, 4), (2, 2)],
    ],
)
@pytest.mark.timeout(900)
def test_killed_again_and_again(start: Callable[..., Group], stream: Stream, shares: list[tuple[int, int]]) -> None:
    kill_and_resume(start, stream, shares, seed=sum(10 * r + w for r, w in shares), most=16)


# in this process


def take(loader: Loader, batches: int) -> list[Batch]:
    """The next so many batches; what was made beyond them is thrown away, as by a kill."""
    with loader:
        return list(islice(loader, batches))


def test_the_hashes_tell_batches_and_augmentation_apart(stream: Stream) -> None:
    assert len(set(stream.hashes)) == stream.plan.n_batches == 80
    other = dataset_of(stream.layout, replace(stream.plan, epoch=2))
    assert all(hash_of(batch) != stream.hashes[batch.step] for batch in take(Loader(other), 5))


OPTIONS = st.fixed_dictionaries(
    {
        "look_ahead": st.integers(0, 20),
        "prefetch": st.integers(0, 8),
        "gap_bytes": st.sampled_from([0, 700, 2**18]),
        "budget_bytes": st.sampled_from([40_000, 2**20, 2**31]),
    }
)
PART = st.tuples(st.sampled_from([1, 2, 4]), st.integers(0, 12), OPTIONS)


@settings(max_examples=8, deadline=None)
@given(parts=st.lists(PART, max_size=5), last=OPTIONS)
def test_any_cuts_ranks_and_options_give_the_plan(stream: Stream, parts: list[Any], last: dict[str, int]) -> None:
    state = stream.at(0)
    done: list[str] = []
    for ranks, rounds, options in [*parts, (1, 80, last)]:
        rounds = min(rounds, (80 - len(done)) // ranks)  # short rounds have a test of their own
        taken, states = [], []
        for rank in range(ranks):
            loader = stream.loader(rank, ranks, state, **options)
            taken += take(loader, rounds)
            states.append(loader.state_dict())
        done += [hash_of(batch) for batch in sorted(taken, key=lambda batch: batch.step)]
        assert states == [stream.at(len(done))] * ranks
        state = states[0]
    assert done == stream.hashes


@pytest.mark.parametrize(("ranks", "workers"), SHARES)
def test_ranks_and_workers_share_out_the_plan_and_the_shards(
    stream: Stream, ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each worker of each rank reads; none is a process, which would make the same."""
    found: dict[int, tuple[str, tuple[int, int]]] = {}
    fetched, used = 0, 0
    of_shard: dict[int, tuple[int, int]] = {}
    for rank, worker in product(range(ranks), range(max(workers, 1))):
        if workers:
            info = SimpleNamespace(id=worker, num_workers=workers)
            monkeypatch.setattr("geostream.streaming.dataset.get_worker_info", lambda info=info: info)
        batches = list(dataset_of(stream.layout, stream.plan, rank, ranks))
        for batch in batches:
            assert batch.step not in found
            found[batch.step] = hash_of(batch), (rank, batch.worker)
            place = stream.layout.pairs("train").place[batch.tensors["pair"].numpy()]
            for shard in np.unique(stream.layout.shard_of_place[place]).tolist():
                assert of_shard.setdefault(shard, (rank, worker)) == (rank, worker)
        fetched, used = fetched + batches[-1].stats.bytes_fetched, used + batches[-1].stats.bytes_used
        assert len(batches) == stream.plan.n_batches // (ranks * max(workers, 1))
    assert [found[step][0] for step in range(len(found))] == stream.hashes
    # Batch by batch the ranks take turns, and within each its workers.
    turns = [found[step][1] for step in range(ranks * max(workers, 1))]
    assert turns == [(rank, worker) for worker in range(max(workers, 1)) for rank in range(ranks)]
    assert (fetched, used) == (stream.stats.bytes_fetched, stream.stats.bytes_used)


def test_batches_made_ahead_by_a_worker_are_not_counted(stream: Stream) -> None:
    loader = Loader(dataset_of(stream.layout, stream.plan), workers=2)
    assert [hash_of(batch) for batch in take(loader, 5)] == stream.hashes[:5]
    assert loader.state_dict() == stream.at(5)
    # Worker 0 now begins with an odd step.
    assert [hash_of(batch) for batch in take(loader, 100)] == stream.hashes[5:]
    assert loader.state_dict() == stream.at(80)


@pytest.mark.parametrize("cursor", [0, 1, 7, 78, 79])
def test_a_stored_position_is_where_it_goes_on(stream: Stream, cursor: int) -> None:
    loader = stream.loader()
    assert loader.state_dict() == stream.at(0)
    take(loader, cursor)
    state = loader.state_dict()
    assert state == stream.at(cursor) == json.loads(json.dumps(state))
    again = stream.loader(state=state)
    assert again.state_dict() == state and len(again) == 80 - cursor
    assert [hash_of(batch) for batch in again] == stream.hashes[cursor:]


def test_the_position_is_behind_the_batch_in_hand(stream: Stream) -> None:
    loader = stream.loader()
    for batch in loader:
        assert loader.state_dict() == stream.at(batch.step + 1)
        assert len(loader) == 80 - batch.step - 1
        if batch.step == 6:
            time.sleep(0.1)  # more are made meanwhile
    assert loader.state_dict() == stream.at(80)


def test_a_loader_iterated_again_goes_on_where_it_stood(stream: Stream) -> None:
    loader = stream.loader()
    seen = [hash_of(batch) for batch in take(loader, 3)]
    for batch in loader:  # left without closing it
        seen.append(hash_of(batch))
        if len(seen) == 9:
            break
    seen += [hash_of(batch) for batch in loader]
    assert seen == stream.hashes
    assert list(loader) == [] and len(loader) == 0


def test_a_position_loaded_in_mid_stream_ends_that_stream(stream: Stream) -> None:
    loader = stream.loader()
    running = iter(loader)
    for _ in range(5):
        next(running)
    loader.load_state_dict(stream.at(2))
    assert list(running) == []
    assert [hash_of(batch) for batch in loader] == stream.hashes[2:]


def test_loaders_of_one_dataset_have_positions_of_their_own(stream: Stream) -> None:
    dataset = dataset_of(stream.layout, stream.plan)
    one, other = Loader(dataset), Loader(dataset)
    take(one, 4)
    other.load_state_dict(stream.at(9))
    assert [loader.state_dict()["cursor"] for loader in (one, other, Loader(dataset))] == [4, 9, 0]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_at_the_end_there_is_nothing_left(stream: Stream, ranks: int) -> None:
    for rank in range(ranks):
        loader = stream.loader(rank, ranks, stream.at(80))
        assert len(loader) == 0 and list(loader) == []
        assert loader.state_dict() == stream.at(80) and loader.stats.requests == 0


def test_the_last_round_is_short_for_the_last_ranks(stream: Stream) -> None:
    loaders = [stream.loader(rank, 4, stream.at(74)) for rank in range(4)]
    assert [len(loader) for loader in loaders] == [2, 2, 1, 1]
    assert [[batch.step for batch in loader] for loader in loaders] == [[74, 78], [75, 79], [76], [77]]
    assert [loader.state_dict()["cursor"] for loader in loaders] == [80, 80, 78, 78]


def test_a_position_in_another_plan_is_refused(stream: Stream) -> None:
    loader = stream.loader(state=stream.at(6))
    other = replace(stream.plan, epoch=2)
    with pytest.raises(StaleArtefact, match=f"plan {other.hash[:12]}"):
        loader.load_state_dict({"plan": other.hash, "cursor": 3})
    assert loader.state_dict() == stream.at(6)
    assert hash_of(take(loader, 1)[0]) == stream.hashes[6]


@pytest.mark.parametrize("cursor", [-1, 81, "many", None, [3], 2.5, float("nan"), float("inf")])
def test_a_position_that_is_none_is_refused(stream: Stream, cursor: object) -> None:
    with pytest.raises(BadInput, match=r"position"):
        stream.loader(state={"plan": stream.plan.hash, "cursor": cursor})


@pytest.mark.parametrize("state", [{}, {"cursor": 3}, {"plan": "p"}, None, [1, 2], 7])
def test_a_state_that_is_none_is_refused(stream: Stream, state: Any) -> None:
    with pytest.raises(BadInput, match="plan .*cursor"):
        stream.loader().load_state_dict(state)


@pytest.mark.parametrize(("ranks", "workers"), [(3, 0), (8, 0), (2, 4), (4, 2), (1, 3)])
def test_ranks_and_workers_must_divide_the_lanes(stream: Stream, ranks: int, workers: int) -> None:
    with pytest.raises(BadInput, match="4 lanes"):
        Loader(dataset_of(stream.layout, stream.plan, 0, ranks), workers=workers)


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_is_one_of_the_ranks(stream: Stream, rank: int) -> None:
    with pytest.raises(BadInput, match=f"rank {rank} of 2"):
        dataset_of(stream.layout, stream.plan, rank, 2)


# with damaged images


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    """Three damaged views, two of them in the plan's last four steps; 2 % of the pairs may be replaced."""
    places = tiny_places(places=160, test_places=0, distractors=0)
    for place in (12, 37, 39):
        places[place].images["view-00.jpg"] = places[place].images["view-00.jpg"][:-200]
    store = Store.open(tmp_path_factory.mktemp("damaged"))
    layout = write_layout(store, places, places_per_shard=5)
    return Stream.with_plan(store, layout, replaced_limit=0.02)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("cursor", [0, 33, 76])
def test_stand_ins_are_the_same_for_any_ranks_and_after_a_resume(damaged: Stream, ranks: int, cursor: int) -> None:
    taken = {
        batch.step: hash_of(batch)
        for rank in range(ranks)
        for batch in damaged.loader(rank, ranks, damaged.at(cursor), replaced_limit=0.02)
    }
    assert [taken[step] for step in range(cursor, 80)] == damaged.hashes[cursor:]
