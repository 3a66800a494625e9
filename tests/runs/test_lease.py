"""One trainer a run: the second is refused by name, and takes over once the first is dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geostream.runs import lease
from geostream.runs.lease import FOLDER, Lease, RunHeld
from geostream.runs.run import run_folder
from geostream.store import Store
from geostream.training.checkpoint_files import list_checkpoints
from tests.helpers import tiny_layout
from tests.training.settings import TINY

ROOT = Path(__file__).parents[2]
SETTINGS = TINY.changed(epochs=2, checkpoint_every=2)


def start(store: Store, go: Path, hold: int = 10**6) -> subprocess.Popen[str]:
    """A trainer in a process of its own, which waits within the step after ``hold`` steps until ``go`` is there."""
    command = [sys.executable, "-m", "tests.runs.run_program", store.url, SETTINGS.model_dump_json(), str(hold)]
    return subprocess.Popen([*command, str(go)], cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ})


def wait_for_step(run: Store, trainer: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 90
    while not list_checkpoints(run):
        assert trainer.poll() is None and time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
def test_several_at_once_and_one_trains(tmp_path: Path) -> None:
    root = Store.open(tmp_path / "store")
    tiny_layout(root, places=16)
    trainers = [start(root, tmp_path / "go") for _ in range(3)]
    said = [trainer.communicate(timeout=120)[1] for trainer in trainers]
    refused = [(one, text) for one, text in zip(trainers, said, strict=True) if one.returncode]
    assert len(refused) == 2, said
    for one, text in refused:
        assert one.returncode == 1 and "Traceback" not in text
        assert "runs/one" in text.splitlines()[-1] and "process" in text.splitlines()[-1]
    assert not run_folder(root, "tiny", "one").list(FOLDER)  # given back


@pytest.mark.slow
def test_the_second_names_the_first_and_takes_over_when_it_is_killed(s3_store: Store, tmp_path: Path) -> None:
    root, layout = s3_store, tiny_layout(s3_store, places=16)
    run = run_folder(root, layout.dataset, "one")
    first = start(root, tmp_path / "go", hold=3)
    wait_for_step(run, first)
    second = start(root, tmp_path / "go")
    _, text = second.communicate(timeout=90)
    assert second.returncode == 1 and f"process {first.pid} " in text.splitlines()[-1] and run.url in text
    with pytest.raises(RunHeld, match=str(first.pid)), Lease(run):
        pass
    first.send_signal(signal.SIGKILL)
    first.communicate()
    third = start(root, tmp_path / "go")
    began = time.monotonic()
    _, text = third.communicate(timeout=90)
    assert third.returncode == 0 and time.monotonic() - began < 60
    assert "goes on in epoch" in text and not run.list(FOLDER)
    assert json.loads(run.read("evaluation.json"))


def holder(run: Store, seconds: float, **other: object) -> Store:
    """A lease of a process on another machine, with a sign of life so long ago."""
    beat = datetime.now(UTC) - timedelta(seconds=seconds)
    said = {"host": "elsewhere", "machine": "elsewhere", "pid": 1, "user": "ada", "beat": beat.isoformat()} | other
    run.write_json(f"{FOLDER}/00000004.json", said)
    return run


HOLD = """
import sys, time
from geostream.runs.lease import Lease
from geostream.store import Store
with Lease(Store.open(sys.argv[1])):
    memory = bytearray(2**28)
    memory[::4096] = b"x" * (2**28 // 4096)  # which takes a moment to free
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_that_was_killed_this_moment_is_replaced_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(RunHeld, match=f"process {first.pid} "), Lease(Store.open(tmp_path)):
            pass
        first.kill()
        with Lease(Store.open(tmp_path)) as taken:
            taken.check()


@pytest.mark.parametrize("seconds", [0, 50, -50])
def test_a_holder_elsewhere_with_a_fresh_sign_of_life_is_left_alone(tmp_path: Path, seconds: float) -> None:
    run = holder(Store.open(tmp_path), seconds)
    with pytest.raises(RunHeld, match="ada on elsewhere"), Lease(run):
        pass
    assert run.exists(f"{FOLDER}/00000004.json")


def test_a_silent_holder_elsewhere_is_watched_and_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.1)
    run = holder(Store.open(tmp_path), 100)
    with Lease(run):
        assert [info.path for info in run.list(FOLDER)] == [f"{FOLDER}/00000005.json"]
    assert not run.list(FOLDER)


def test_a_holder_whose_clock_is_behind_is_seen_to_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = holder(Store.open(tmp_path), 1000)
    monkeypatch.setattr(time, "sleep", lambda seconds: holder(run, 990) and None)
    with pytest.raises(RunHeld, match="elsewhere"), Lease(run):
        pass


def test_another_process_under_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    me = lease._identity()
    run = holder(Store.open(tmp_path), 0, machine=me["machine"], pid=me["pid"], started=me["started"] - 100)
    with Lease(run):
        pass
    run = holder(run, 0, machine=me["machine"], pid=me["pid"], started=me["started"])
    with pytest.raises(RunHeld), Lease(run):
        pass


@pytest.mark.parametrize("said", [b"{}", b"[]", b'{"beat": 5, "pid": "x"}'])
def test_a_lease_that_says_nothing_is_taken_over(tmp_path: Path, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.01)
    run = Store.open(tmp_path)
    run.write(f"{FOLDER}/00000001.json", said)
    with Lease(run):
        pass


def test_a_holder_that_was_taken_over_writes_no_more_and_removes_nothing(tmp_path: Path) -> None:
    run = Store.open(tmp_path)
    with pytest.raises(RunHeld, match="elsewhere"), Lease(run) as mine:
        mine.check()
        holder(run, 0)
        mine.check()
    assert [info.path for info in run.list(FOLDER)] == [f"{FOLDER}/00000004.json"]


def test_it_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.05)
    run = Store.open(tmp_path)
    with Lease(run):
        path = f"{FOLDER}/00000001.json"
        first, until = run.read_json(path)["beat"], time.monotonic() + 10
        while run.read_json(path)["beat"] == first:
            assert time.monotonic() < until
            time.sleep(0.02)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["take", "leave", "die"])), max_size=12))
def test_never_two_at_once(tmp_path_factory: pytest.TempPathFactory, moves: list[tuple[int, str]]) -> None:
    """Three that come, go and die in any order: of those that passed a check, one at most still would."""
    run = Store.open(tmp_path_factory.mktemp("run"))
    alive: dict[int, Lease] = {}
    for who, move in moves:
        if move == "take" and who not in alive:
            one = Lease(run)
            try:
                one._acquire()
                alive[who] = one
            except RunHeld:
                assert alive
        elif who in alive:
            one = alive.pop(who)
            if move == "leave":
                one._folder.delete_all([lease._name(one.number)])
            else:  # dead: its object stays, and names a process that is gone
                run.write_json(f"{FOLDER}/{lease._name(one.number)}", one._me | {"pid": 2**22 + 1})
        passed = []
        for one in alive.values():
            try:
                one.check()
                passed.append(one)
            except RunHeld:
                pass
        assert len(passed) == len(alive) <= 1
