"""The thread that keeps a flow run's page up to date: nothing is lost at the end, and no failure reaches the work."""

from __future__ import annotations

import logging
import threading
import time

import pytest

import flows.updates as module
from flows.updates import Updater


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.01)


def test_what_came_last_is_shown() -> None:
    news, shown = [0], list[int]()
    with Updater(lambda: shown.append(news[0])) as updater:
        for number in range(1, 200):
            news[0] = number
            updater.wake()
            time.sleep(0.0001)
    assert shown[-1] == 199 and shown == sorted(shown) and len(shown) < 200


def test_an_update_in_progress_is_followed_by_a_last_one() -> None:
    begun, go_on, news, shown = threading.Event(), threading.Event(), ["old"], list[str]()

    def update() -> None:
        shown.append(news[0])
        begun.set()
        go_on.wait(5)

    with Updater(update) as updater:
        updater.wake()
        assert begun.wait(5)
        news[0] = "new"
        go_on.set()
    assert shown == ["old", "new"]


def test_a_server_that_is_away_is_told_of_once_and_fails_nothing(caplog: pytest.LogCaptureFixture) -> None:
    calls = []

    def update() -> None:
        calls.append(1)
        raise ConnectionError("the server is away")

    with caplog.at_level(logging.WARNING), Updater(update) as updater:
        while len(calls) < 3:
            updater.wake()
            time.sleep(0.01)
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "is away" in caplog.text


def test_an_update_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "END_TIMEOUT", 0.1)
    never = threading.Event()
    started = time.monotonic()
    with Updater(lambda: never.wait(30)) as updater:
        updater.wake()
    assert time.monotonic() - started < 10
    never.set()
