"""SIGTERM and SIGINT: what is under way is made safe, the exit tells, and going on changes nothing."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from geostream.layout import open_layout
from geostream.runs import signals as stopping
from geostream.runs import stages
from geostream.runs.log import RunLog
from geostream.runs.loop import train
from geostream.runs.run import LOG, run_folder
from geostream.runs.signals import Stop, Stopped
from geostream.settings import TrainSettings
from geostream.store import Store
from geostream.training.checkpoint_files import list_checkpoints, read_position
from geostream.training.distributed import ProcessGroup
from tests.helpers import tiny_layout
from tests.training.ranks import RUN_PROGRAM, environment, wait_for
from tests.training.settings import TINY


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Every test here leaves the handlers as it found them, and begins with Python's own.

    What a shell starts in the background ignores SIGINT, and so would the runs that are started here.
    """
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_at_once_where_nothing_is_held(number: signal.Signals, code: int, caplog: pytest.LogCaptureFixture) -> None:
    handlers = [signal.getsignal(one) for one in stopping.SIGNALS]
    with pytest.raises(Stopped) as stopped, Stop(ProcessGroup(), "the run"):
        signal.raise_signal(number)
        raise AssertionError("went on")
    assert stopped.value.code == code
    assert [signal.getsignal(one) for one in stopping.SIGNALS] == handlers
    [line] = caplog.messages
    assert line.startswith(f"the run: stopped by {number.name}; start the same command again to go on")


def test_held_until_it_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    done = []
    with pytest.raises(Stopped) as stopped, Stop(ProcessGroup(), "the run") as stop, stop.held() as asked:
        done.append(asked())
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the same, come by another way
        done.append(asked())
        stop.saved = "saved: all of it"
    assert done == [False, True] and stopped.value.code == 143
    assert caplog.messages == ["the run: stopped by SIGTERM; start the same command again to go on (saved: all of it)"]


def test_a_second_signal_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "ONE", 0.0)
    with pytest.raises(Stopped), Stop(ProcessGroup(), "the run") as stop, stop.held():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("went on")


def test_whoever_listened_before_is_told_when_the_run_is_safe() -> None:
    """As Prefect listens for the cancellation of a flow run."""

    class Cancelled(BaseException):
        pass

    heard = []

    def listen(number: int, frame: object) -> None:
        heard.append(number)
        raise Cancelled

    before = signal.signal(signal.SIGTERM, listen)
    try:
        with pytest.raises(Cancelled), Stop(ProcessGroup(), "the run") as stop, stop.held() as asked:
            signal.raise_signal(signal.SIGTERM)
            assert asked() and not heard
        assert heard == [signal.SIGTERM] and signal.getsignal(signal.SIGTERM) is listen
    finally:
        signal.signal(signal.SIGTERM, before)


def test_other_threads_and_signals_to_be_ignored_are_left_alone() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop(ProcessGroup(), "the run"):
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    seen = []

    def elsewhere() -> None:
        with Stop(ProcessGroup(), "the run") as stop, stop.held() as asked:
            seen.extend([signal.getsignal(signal.SIGTERM), asked()])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL, False]


def test_an_error_beside_it_stays_what_it_is() -> None:
    with pytest.raises(ZeroDivisionError), Stop(ProcessGroup(), "the run") as stop, stop.held():
        signal.raise_signal(signal.SIGTERM)
        raise ZeroDivisionError


SETTINGS = TINY.changed(epochs=2, checkpoint_every=4, lanes=2)
HELD = 17  # the step within which the signal comes: number 5 of the second epoch, right behind a checkpoint


def stopped_and_gone_on(folder: Path, number: signal.Signals, settings: TrainSettings) -> tuple[str, Store]:
    """A run that gets the signal within step HELD, to its process group, as Ctrl-C does; its output, and its folder."""
    store = Store.open(folder / "store")
    tiny_layout(store, places=24, test_places=8, views=2, view_size=(32, 64))
    run = run_folder(store, "tiny", "one")
    go = folder / "go"
    program = [sys.executable, RUN_PROGRAM, store.url, settings.model_dump_json(), str(HELD - 1), str(go)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(program, env=environment(), start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            wait_for(lambda: run.exists("checkpoints/step-00000016/state.json"), process)
            os.killpg(process.pid, number)
            go.touch()
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + number, output
    [*_, newest] = list_checkpoints(run)
    position = read_position(run, newest)
    assert (position.step, position.cursor, position.finished) == (HELD, HELD - 12, False)
    train(store, open_layout(store), "one", settings.changed(workers=0))
    return output, run


@pytest.mark.slow
@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 0)])
def test_a_process_is_stopped_in_mid_epoch(tmp_path: Path, number: signal.Signals, workers: int) -> None:
    """Its loader's processes hear it, too."""
    output, run = stopped_and_gone_on(tmp_path, number, SETTINGS.changed(workers=workers))
    told = f"{run.url}: stopped by {number.name}; start the same command again to go on (saved: epoch 2, batch 5)"
    assert output.splitlines()[-1] == told and "Traceback" not in output
    whole = Store.open(tmp_path / "whole")
    train(whole, tiny_layout(whole, places=24, test_places=8, views=2, view_size=(32, 64)), "one", SETTINGS)
    other = run_folder(whole, "tiny", "one")
    assert list_checkpoints(run) == list_checkpoints(other)
    for path in ("model.safetensors", "optimizer.safetensors"):
        name = f"checkpoints/{list_checkpoints(run)[-1]}/{path}"
        assert run.read(name) == other.read(name)
    losses = [[row["loss"] for row in RunLog(one, LOG).of("train")] for one in (run, other)]
    assert losses[0] == losses[1]


def test_a_run_is_stopped_at_once_outside_of_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While it mines, say; and what was being done is done when it goes on."""
    store = Store.open(tmp_path)
    layout = tiny_layout(store, places=12, test_places=4, view_size=(32, 64))
    settings = TINY.changed(epochs=2, batch_size=2)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO), pytest.raises(Stopped):
        patch.setattr(stages, "build_visual_graph", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
        train(store, layout, "one", settings)
    told = "stopped by SIGTERM; start the same command again to go on (saved: epoch 1, batch 6)"
    assert caplog.messages[-1].endswith(told)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    result = train(store, layout, "one", settings)
    assert [plan["source"] for plan in result.plans] == ["gps", "visual"]
