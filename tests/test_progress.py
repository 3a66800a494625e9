"""Progress is heard by whoever listens, in the thread of the work and nowhere else."""

from __future__ import annotations

import threading

from geostream.progress import Bar, listening, track


def test_a_listener_hears_every_advance_of_every_bar() -> None:
    heard: list[tuple[str, int, int | None]] = []
    with listening(lambda *what: heard.append(what)):
        with Bar("shards", 10) as bar:
            bar.advance(4)
            bar.advance(6, shards=2)
        assert list(track(iter("ab"), "letters")) == ["a", "b"]
    assert heard == [("shards", 4, 10), ("shards", 10, 10), ("letters", 1, None), ("letters", 2, None)]


def test_nobody_hears_what_another_thread_or_a_later_bar_does() -> None:
    heard: list[tuple[str, int, int | None]] = []

    def work() -> None:
        with Bar("elsewhere", 1) as bar:
            bar.advance()

    with listening(lambda *what: heard.append(what)):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    work()
    assert heard == []
