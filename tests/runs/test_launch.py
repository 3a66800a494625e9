"""A run trained by processes of its own: they train as one does, tell what happens, and never outlive who waits."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from geostream import errors
from geostream.errors import BadInput, GeostreamError, Interrupted, Stalled
from geostream.layout import open_layout
from geostream.runs import launch
from geostream.runs.launch import Launch, Ranks
from geostream.runs.lease import RunHeld
from geostream.runs.loop import train
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.training.checkpoint_files import list_checkpoints, read_position
from geostream.training.distributed import RankLost
from infra.process import LOOPBACK
from tests.helpers import tiny_layout
from tests.runs.test_ranks_of_a_run import EMBEDDED, SETTINGS, alone, assert_same_run, run_of
from tests.training.ranks import TORCHRUN, environment
from tests.training.settings import TINY

__all__ = ["alone"]  # a fixture

Lines = list[tuple[int, str]]


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks need two GPUs, or none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def on_s3(store: Store) -> Store:
    tiny_layout(store, places=24, test_places=8, views=2, view_size=(32, 64))
    return store


def launched(
    store: Store, processes: int, settings: TrainSettings = SETTINGS, name: str = "one", lines: Lines | None = None
) -> Launch:
    def log(level: int, text: str, fields: Mapping[str, Any] | None = None) -> None:
        if lines is not None:
            lines.append((level, f"{text} {dict(fields)}" if fields and "stage" not in fields else text))

    ranks = Ranks(processes)
    layout, show = open_layout(store), partial(log, logging.INFO)
    return Launch(store, layout, name, settings, cluster=None, ranks=ranks, log=log, show=show)


def wait_for_checkpoint(store: Store, step: int, timeout: float = 240) -> None:
    until = time.monotonic() + timeout
    while not run_of(store).exists(f"checkpoints/step-{step:08d}/state.json"):
        assert time.monotonic() < until
        time.sleep(0.02)


def assert_saved_within_an_epoch(store: Store, step: int) -> None:
    """The newest checkpoint is of this step or a later one, and not of the end of an epoch."""
    position = read_position(run_of(store), list_checkpoints(run_of(store))[-1])
    assert position.step >= step and not position.finished


# what the parent makes of what the child does


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Store:
    """A store; its runs are launched with what each does instead of training."""
    monkeypatch.setattr(launch, "MODULE", "tests.runs.launch_program")
    store = Store.open(tmp_path)
    tiny_layout(store)
    return store


def test_all_that_is_said_is_logged(stand_in: Store) -> None:
    lines: Lines = []
    with launched(stand_in, 1, TINY, "done", lines) as training:
        training.wait()
    warning = (logging.WARNING, "a warning {'epoch': 3}")
    assert sorted(lines) == [(logging.INFO, "no report"), (logging.INFO, "the last words"), warning]


@pytest.mark.parametrize(
    ("what", "kind", "named"),
    [
        ("killed", Stalled, r"runs/killed: .*SIGKILL.*the last words"),
        ("stopped", Interrupted, "runs/stopped: .*SIGTERM"),
        ("wordless", GeostreamError, "runs/wordless: .* 3: the last words"),
        ("defect", RuntimeError, "ValueError: seven"),
        ("refused", BadInput, "^nowhere: no such folder$"),
        ("lost", Stalled, "^rank 1 was ended by SIGKILL$"),
    ],
)
def test_an_end_becomes_one_error(stand_in: Store, what: str, kind: type[Exception], named: str) -> None:
    lines: Lines = []
    with pytest.raises(kind, match=named) as found, launched(stand_in, 1, TINY, what, lines) as training:
        training.wait()
    assert type(found.value) is kind and "\n" not in str(found.value)
    assert [text for level, text in lines if level == logging.ERROR] == ["Traceback of seven"] * (what == "defect")


def test_what_does_not_listen_is_killed(stand_in: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "KILL_TIMEOUT", 1.0)
    with pytest.raises(KeyboardInterrupt), launched(stand_in, 1, TINY, "deaf") as training:
        while not training._ranks:
            time.sleep(0.02)
        raise KeyboardInterrupt
    assert training._process.poll() == -9
    [rank] = training._ranks
    rank.wait(5)


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        ({"processes": 0}, "processes=0"),
        ({"nodes": 0}, "nodes=0"),
        ({"nodes": 2}, "HOST:PORT"),
        ({"nodes": 2, "address": "host"}, "address=host"),
        ({"nodes": 2, "address": ":29500"}, "address=:29500"),
        ({"nodes": 2, "address": "host:65536"}, "address=host:65536"),
        ({"nodes": 2, "address": "host:٣"}, "address=host:٣"),
    ],
)
def test_what_ranks_cannot_be(ranks: dict[str, object], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        Ranks(**ranks)  # type: ignore[arg-type]


def test_an_error_is_reported_by_a_name_that_every_process_knows() -> None:
    assert errors.kind(BadInput("")) == "BadInput" and errors.kind(errors.MissingRaw("")) == "MissingRaw"
    assert errors.kind(RankLost("")) == "Stalled" and errors.kind(RunHeld("")) == "GeostreamError"


# real ranks on a real S3 server


@pytest.mark.slow
def test_two_processes_train_on_s3_as_one_does(s3_store: Store, alone: Store) -> None:
    lines: Lines = []
    with launched(on_s3(s3_store), 2, lines=lines) as training:
        training.wait()
    assert len(training._ranks) == 2 and training._process.returncode == 0
    assert_same_run(s3_store, alone, EMBEDDED)
    said = [text for _, text in lines]
    for stage in ("plan", "train", "mine", "evaluate"):
        assert [text for text in said if text.startswith(f"{stage}: epoch ")], said
    with launched(s3_store, 1, lines=lines) as training:  # nothing is left to do, and one process needs no launcher
        training.wait()
    assert not training._ranks and "finished before" in lines[-1][1]


@pytest.mark.slow
def test_two_machines_train_as_one_does(s3_store: Store, alone: Store) -> None:
    """The first by a launch, the second by the command in docs/how-to/several-gpus.md."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    address, store = f"{LOOPBACK}:{port}", on_s3(s3_store)
    words = ["--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "1", "--master-addr", LOOPBACK]
    words += ["--master-port", str(port), "-m", "--", "geostream", "train", store.url, "--run", "one"]
    plain = TrainSettings().flat()
    changed = {name: value for name, value in SETTINGS.flat().items() if value != plain[name]}
    words += [word for name, value in changed.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    ranks = Ranks(processes=1, nodes=2, address=address)
    quiet: Any = lambda *line: None  # noqa: E731
    first = Launch(store, open_layout(store), "one", SETTINGS, cluster=None, ranks=ranks, log=quiet, show=quiet)
    with subprocess.Popen([*TORCHRUN[:3], *words], env=environment()) as second:
        try:
            with first:
                first.wait()
            assert second.wait(60) == 0
        finally:
            second.terminate()
    assert_same_run(store, alone, EMBEDDED)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_cancelled_leaves_a_checkpoint_and_no_process(
    s3_store: Store, alone: Store, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    monkeypatch.setattr(launch, "MODULE", "tests.runs.launch_slowly")
    lines: Lines = []
    with pytest.raises(KeyboardInterrupt), launched(on_s3(s3_store), processes, lines=lines) as training:
        wait_for_checkpoint(s3_store, 2)
        raise KeyboardInterrupt
    assert training._process.poll() is not None and not any(rank.is_running() for rank in training._ranks)
    assert_saved_within_an_epoch(s3_store, 3)
    assert len([text for _, text in lines if "stopped by SIGTERM" in text and "(saved: epoch 1, batch" in text]) == 1
    train(s3_store, open_layout(s3_store), "one", SETTINGS)
    assert_same_run(s3_store, alone, EMBEDDED)


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_next_launch_goes_on(
    s3_store: Store, alone: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: Lines = []
    with monkeypatch.context() as patch, pytest.raises(Stalled, match="rank 1 .*SIGKILL"):
        patch.setattr(launch, "MODULE", "tests.runs.launch_slowly")
        with launched(on_s3(s3_store), 2, lines=lines) as training:
            wait_for_checkpoint(s3_store, 2)
            ranks = {rank.environ()["RANK"]: rank for rank in training._ranks}
            ranks["1"].kill()
            training.wait()
    assert not any(rank.is_running() for rank in training._ranks)
    assert not [text for _, text in lines if "Traceback" in text]
    with launched(s3_store, 2, lines=lines) as training:
        training.wait()
    assert [text for _, text in lines if "goes on in epoch 1" in text]
    assert_same_run(s3_store, alone, EMBEDDED)


@pytest.mark.slow
def test_without_their_launcher_the_ranks_end(s3_store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot save anything then, because the launcher keeps the store by which they meet."""
    monkeypatch.setattr(launch, "MODULE", "tests.runs.launch_slowly")
    with pytest.raises(Stalled, match="SIGKILL"), launched(on_s3(s3_store), 2) as training:
        wait_for_checkpoint(s3_store, 2)
        training._process.kill()
        training.wait()
    assert len(training._ranks) == 2 and not any(rank.is_running() for rank in training._ranks)
    assert_saved_within_an_epoch(s3_store, 2)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_no_process_outlives_one_that_was_killed(s3_store: Store, processes: int) -> None:
    """SIGKILL to whoever waits: the ranks write a checkpoint and end."""
    command = ["-m", "tests.runs.launch_and_wait", on_s3(s3_store).url, SETTINGS.model_dump_json(), str(processes)]
    with subprocess.Popen([sys.executable, *command], env=environment(), stdout=subprocess.DEVNULL) as waiting:
        wait_for_checkpoint(s3_store, 2)
        family = psutil.Process(waiting.pid).children(recursive=True)
        assert len(family) >= (3 if processes == 2 else 1)
        waiting.kill()
        _, left = psutil.wait_procs(family, timeout=30)
        for one in left:
            one.kill()
    assert not left
    assert_saved_within_an_epoch(s3_store, 3)


@pytest.mark.slow
def test_what_the_ranks_refuse_is_one_error_of_one_line(s3_store: Store) -> None:
    lines: Lines = []
    training = launched(on_s3(s3_store), 2, SETTINGS.changed(step_batches=3), lines=lines)
    with pytest.raises(BadInput, match="2 ranks .*3 batches") as found, training:
        training.wait()
    assert "\n" not in str(found.value) and not [text for _, text in lines if "Traceback" in text]
    assert not run_of(s3_store).exists("settings.json")
