"""Whoever waits for batches learns when none can come: from a worker, a thread, or a store that is gone or stuck."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from torch.utils.data import DataLoader

from geostream import errors
from geostream.errors import BadInput, ForkedProcess, GeostreamError, Stalled
from geostream.layout import Layout
from geostream.layout.members import MemberTable
from geostream.store import Store
from geostream.streaming import loader as loading
from geostream.streaming import shared, transport, workers
from geostream.streaming.dataset import StreamDataset, plan_dataset, scan_dataset
from geostream.streaming.fetch import Fetcher
from geostream.streaming.loader import Loader
from geostream.streaming.pipeline import Batch
from tests.conftest import ROOT
from tests.helpers import tiny_layout, tiny_places, write_layout
from tests.streaming.bad_changes import Exit, FewFiles, Signal, Slow, SmallFiles, Stuck, Unspeakable, Wrong
from tests.streaming.plans import SIZES, assert_same, hand_made_plan

LIMIT = 60  # seconds within which a wait must end

# What a thread that was made to fail leaves behind.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    made = tiny_layout(Store.open(tmp_path_factory.mktemp("store")), places=24, places_per_shard=3)
    list(Loader(dataset_of(made), workers=1))  # starts the process that workers come from as quickly as ours do
    return made


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    until = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < until:  # torch's own loader ends them by and by
        time.sleep(0.05)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("geostream")]
    gc.collect()  # a DataLoader that is still referred to has not ended its workers
    assert not multiprocessing.active_children()


def dataset_of(layout: Layout, change: Any = None) -> StreamDataset:
    return plan_dataset(layout, hand_made_plan(layout, lanes=2), SIZES, change=change)


def plain(dataset: StreamDataset, number: int = 1, context: str = "forkserver", **how: Any) -> DataLoader[Batch]:
    return DataLoader(
        dataset, batch_size=None, num_workers=number, multiprocessing_context=context if number else None, **how
    )


def batches_of(loader: Loader | DataLoader[Batch]) -> list[Batch]:
    """All of them; then the workers end, whoever still refers to the error that one has raised."""
    if isinstance(loader, Loader):
        with loader:
            return list(loader)
    batches = iter(loader)
    try:
        return list(batches)
    finally:
        if loader.num_workers and not loader.persistent_workers:
            with suppress(RuntimeError):  # that a worker has failed is raised once more while it is waited for
                batches._shutdown_workers()  # type: ignore[attr-defined]


def within(seconds: float, work: Callable[[], Any]) -> None:
    """Do ``work``, which must not take longer."""
    began = time.monotonic()
    try:
        work()
    finally:
        assert time.monotonic() - began < seconds


# a plain DataLoader


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere workers are not forked")
def test_a_forked_worker_says_at_once_what_to_use(layout: Layout) -> None:
    with pytest.raises(ForkedProcess, match="forkserver"):
        within(LIMIT, lambda: batches_of(plain(dataset_of(layout), context="fork", timeout=LIMIT)))


@pytest.mark.parametrize(
    ("number", "context", "how"),
    [
        (0, "", {}),
        (1, "forkserver", {}),
        (2, "forkserver", {"persistent_workers": True}),
        pytest.param(2, "spawn", {"persistent_workers": True}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("error:Length of IterableDataset")
def test_a_plain_dataloader_makes_the_same_batches(
    layout: Layout, number: int, context: str, how: dict[str, Any]
) -> None:
    expected = list(Loader(dataset_of(layout)))
    batches = plain(dataset_of(layout), number, context, **how)
    assert len(batches) == len(expected)
    for _ in range(2):  # epochs
        assert_same(list(batches), expected)


def test_no_room_for_the_plan_is_told(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loader processes get it as a file."""

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shared, "TemporaryFile", full)
    for loader in (Loader(dataset_of(layout), workers=2), plain(dataset_of(layout))):
        with pytest.raises(GeostreamError, match=r"No space left .*TMPDIR"):
            within(LIMIT, lambda loader=loader: batches_of(loader))  # type: ignore[misc]
    assert batches_of(Loader(dataset_of(layout)))  # in this process there is no need for one


def test_a_plain_dataloader_raises_errors_and_hands_out_none(tmp_path: Path) -> None:
    places = tiny_places(places=6)
    places[4].images["view-00.jpg"] = places[4].images["view-00.jpg"][:-200]
    layout = write_layout(Store.open(tmp_path), places)
    dataset = scan_dataset(layout, layout.references("train"), layout.pairs("train"), SIZES, batch_size=4)
    for number in (0, 1):
        with pytest.raises(BadInput, match=r"view-00.jpg of place alpha-0004 in .*shard-00001.tar: .*JPEG"):
            batches_of(plain(dataset, number))


def test_every_error_survives_torch() -> None:
    """Which makes it anew in the trainer, from one text."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GeostreamError)]
    assert len(kinds) > 8 and all(str(kind("one text")) == "one text" for kind in kinds)


# what a worker cannot hand over

SHM_PROGRAM = """
import sys
from torch.utils.data import DataLoader
from geostream.layout import open_layout
from geostream.store import Store
from geostream.streaming.dataset import scan_dataset
from geostream.streaming.loader import Loader
from geostream.streaming.pipeline import ImageSizes

if __name__ == "__main__":
    layout = open_layout(Store.open(sys.argv[1]))
    sizes = ImageSizes((1024, 1024), (1024, 1024))
    dataset = scan_dataset(layout, layout.references("train"), layout.pairs("train"), sizes, batch_size=8)
    if sys.argv[2] == "ours":
        list(Loader(dataset, workers=1))
    else:
        list(DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="forkserver"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["ours", "plain"])
def test_shared_memory_that_is_too_small_is_named(layout: Layout, tmp_path: Path, whose: str) -> None:
    """A real /dev/shm of 8 MB, as containers have one of 64 MB, for batches of 24."""
    private = ["unshare", "--mount", "sh", "-ec", 'mount -t tmpfs -o size=8m tmpfs /dev/shm; exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*private, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a file system of its own may not be mounted here")
    program = tmp_path / "program.py"
    program.write_text(SHM_PROGRAM)
    store = layout.store.url.removesuffix("/tiny/layouts/g0")
    done = subprocess.run(
        [*private, sys.executable, str(program), store, whose],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    told = [line for line in done.stderr.splitlines() if "Stalled: " in line]
    assert done.returncode == 1 and told, done.stderr
    for name in ("/dev/shm", "--shm-size", "workers=0"):
        assert name in told[-1]


@pytest.mark.parametrize("whose", [Loader, pytest.param(plain, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("change", "named"),
    [(SmallFiles(), "/dev/shm.*too large"), (FewFiles(), "ulimit -n"), (Unspeakable(), "Unspeakable.*<locals>")],
)
def test_what_cannot_be_handed_over_is_told(layout: Layout, whose: Any, change: Any, named: str) -> None:
    with pytest.raises(Stalled, match=named):
        within(LIMIT, lambda: batches_of(whose(dataset_of(layout, change), 1)))


# workers


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (Signal(signal.SIGKILL), "killed"),
        (Signal(signal.SIGBUS), "/dev/shm"),
        (Exit("thread"), "exit code 3"),
        pytest.param(Exit("process"), "exit code 3", marks=pytest.mark.slow),
        pytest.param(Signal(signal.SIGTERM), "SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_ends_is_told(layout: Layout, change: Any, named: str) -> None:
    with pytest.raises(Stalled, match=rf"^loader worker \d+ .*{named}"):
        within(LIMIT, lambda: list(Loader(dataset_of(layout, change), workers=2)))


@pytest.mark.slow
def test_a_workers_own_error_keeps_its_traceback(layout: Layout) -> None:
    with pytest.raises(ZeroDivisionError, match=r"(?s)in DataLoader worker process.*bad_changes\.py.*in a change"):
        list(Loader(dataset_of(layout, Wrong()), workers=1))


def test_a_worker_that_is_killed_between_two_batches_is_told(layout: Layout) -> None:
    with Loader(dataset_of(layout), workers=1) as loader, pytest.raises(Stalled, match="killed"):
        for _ in loader:  # what it made ahead cannot be had any more: the bytes are the worker's
            for worker in multiprocessing.active_children():
                worker.kill()
                worker.join()


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_given_up(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGSTOP, while what it made ahead waits to be fetched from it."""
    monkeypatch.setattr(workers, "HEARTBEAT_TIMEOUT", 3.0)

    def load() -> None:
        with Loader(dataset_of(layout), workers=2) as loader:
            for _ in loader:
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid or 0, signal.SIGSTOP)

    with pytest.raises(Stalled, match=r"loader worker \d+ .*sign of life"):
        within(LIMIT, load)


@pytest.mark.slow
@pytest.mark.slow
def test_leaving_ends_a_worker_that_is_stopped(layout: Layout) -> None:
    def load() -> None:
        with Loader(dataset_of(layout), workers=1) as loader:
            next(iter(loader))
            [worker] = multiprocessing.active_children()
            os.kill(worker.pid or 0, signal.SIGSTOP)

    within(LIMIT, load)


@pytest.mark.parametrize("sign", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_process_that_starts_workers_dies_or_stops(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, sign: signal.Signals
) -> None:
    """In the middle of an epoch. The next one has another."""
    monkeypatch.setattr(workers, "START_TIMEOUT", 20.0)
    expected = list(Loader(dataset_of(layout)))
    with Loader(dataset_of(layout, Slow()), workers=1) as loader:
        batches = iter(loader)
        next(batches)
        server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
        os.kill(server, sign)
        if sign == signal.SIGKILL:
            with pytest.raises(Stalled, match=r"loader worker \d+"):
                within(LIMIT, lambda: list(batches))
    if sign == signal.SIGSTOP:
        with pytest.raises(Stalled, match="started"):
            within(LIMIT, lambda: list(Loader(dataset_of(layout), workers=1)))
    assert_same(list(Loader(dataset_of(layout), workers=1)), expected)


@pytest.mark.parametrize("how", [{"workers": 1}, {"threads": 1}, {"threads": 2}])
@pytest.mark.slow
def test_a_batch_that_takes_for_ever_is_given_up(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: dict[str, Any]
) -> None:
    """Where its maker is alive: decoding or augmenting is stuck."""
    free = threading.Event()
    stuck = Stuck() if "workers" in how else (lambda _: free.wait())
    monkeypatch.setattr(workers, "BATCH_TIMEOUT", 3.0)
    monkeypatch.setattr(workers, "LOG_INTERVAL", 1.0)
    monkeypatch.setattr(loading, "SHUTDOWN_TIMEOUT", 1.0)
    try:
        with pytest.raises(Stalled, match="3 s"):
            within(LIMIT, lambda: list(Loader(dataset_of(layout, stuck), **how)))
    finally:
        free.set()
    assert "waited for for 2 s" in caplog.text

    def join() -> None:
        for thread in threading.enumerate():
            if thread.name.startswith("geostream"):
                thread.join()

    within(LIMIT, join)


STUCK_PROGRAM = """
import sys
from geostream.layout import open_layout
from geostream.store import Store
from geostream.streaming import loader, pipeline, workers
from geostream.streaming.dataset import scan_dataset
from tests.streaming.bad_changes import Stuck
from tests.streaming.plans import SIZES, hand_made_plan
from geostream.streaming.dataset import plan_dataset

workers.BATCH_TIMEOUT, loader.SHUTDOWN_TIMEOUT, pipeline.SHUTDOWN_TIMEOUT = 2.0, 1.0, 1.0
layout = open_layout(Store.open(sys.argv[1]))
list(loader.Loader(plan_dataset(layout, hand_made_plan(layout), SIZES, change=Stuck()), threads=2))
"""


@pytest.mark.slow
def test_a_program_whose_decoding_is_stuck_ends(layout: Layout) -> None:
    store = layout.store.url.removesuffix("/tiny/layouts/g0")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", STUCK_PROGRAM, store],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert done.returncode == 1 and "no batch came for" in done.stderr


# threads


def test_a_thread_that_ends_without_a_word_is_told() -> None:
    ended = threading.Thread(target=int)
    ended.start()
    ended.join()
    with pytest.raises(Stalled, match="thread that makes batches"):
        within(5, lambda: loading._next(queue.Queue(), ended))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_thread_that_exits_ends_the_pass(layout: Layout, threads: int) -> None:
    with pytest.raises(SystemExit):
        within(LIMIT, lambda: list(Loader(dataset_of(layout, Exit("thread")), threads=threads)))


def reading(layout: Layout, first: Callable[[Fetcher], None]) -> None:
    """Read everything, after ``first``."""
    members = MemberTable.of(layout)
    with Fetcher(members, [np.arange(len(members.place))]) as fetcher:
        first(fetcher)
        list(fetcher)


def test_a_fetching_thread_that_ends_is_told(layout: Layout) -> None:
    def end(fetcher: Fetcher) -> None:
        fetcher._transport._loop.call_soon_threadsafe(sys.exit)
        fetcher._transport._thread.join()

    with pytest.raises(Stalled, match="thread that reads"):
        within(LIMIT, lambda: reading(layout, end))


def test_a_fetching_thread_that_is_stuck_is_told(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "HEARTBEAT_TIMEOUT", 2.0)
    monkeypatch.setattr(transport, "SHUTDOWN_TIMEOUT", 0.5)
    free = threading.Event()
    try:
        with pytest.raises(Stalled, match="stuck for 2 s"):
            within(LIMIT, lambda: reading(layout, lambda fetcher: stick(fetcher, free)))
    finally:
        free.set()
        for thread in threading.enumerate():
            if thread.name == "geostream-fetch":
                thread.join(10)


def stick(fetcher: Fetcher, free: threading.Event) -> None:
    fetcher._transport._loop.call_soon_threadsafe(free.wait)


def test_a_read_that_fails_by_a_timeout_of_its_own_is_not_waited_for(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: Future[Any] = Future()
    failed.set_exception(TimeoutError("somebody else's"))
    monkeypatch.setattr(transport.Transport, "read", lambda *_: failed)
    with pytest.raises(TimeoutError, match="somebody else's"):
        within(LIMIT, lambda: reading(layout, lambda _: None))


SLOW_PROGRAM = """
import sys
from geostream.layout import open_layout
from geostream.store import Store
from geostream.streaming import loader, workers
from geostream.streaming.dataset import plan_dataset
from tests.streaming.bad_changes import Slow
from tests.streaming.plans import SIZES, hand_made_plan

if __name__ == "__main__":
    workers.HEARTBEAT_TIMEOUT = workers.BATCH_TIMEOUT = 4.0
    layout = open_layout(Store.open(sys.argv[1]))
    for batch in loader.Loader(plan_dataset(layout, hand_made_plan(layout), SIZES, change=Slow()), workers=1):
        print(batch.step, flush=True)
"""


@pytest.mark.slow
@pytest.mark.slow
def test_a_program_that_was_suspended_has_waited_for_nothing(layout: Layout) -> None:
    """Stopped with its worker for longer than any limit, and continued: it goes on."""
    store = layout.store.url.removesuffix("/tiny/layouts/g0")
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_PROGRAM, store],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None and program.stdout.readline() == "0\n"
        family = [psutil.Process(program.pid), *psutil.Process(program.pid).children(recursive=True)]
        for process in family:
            process.suspend()
        time.sleep(7)
        for process in family:
            process.resume()
        steps, _ = program.communicate(timeout=LIMIT)
    assert program.returncode == 0 and steps.split() == [str(step) for step in range(1, 8)]
