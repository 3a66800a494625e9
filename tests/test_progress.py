"""What is shown on standard error, as lines for people or objects of JSON, and who else hears of progress."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from geostream import progress
from geostream.errors import BadInput
from geostream.progress import Bar, JsonLines, listening, log_to_stderr, track
from tests.conftest import ROOT

BASE = {"time", "level", "logger", "message"}


def command(*words: str, log: str) -> subprocess.CompletedProcess[str]:
    """The command ``geostream`` in a process of its own, because the form of the lines is set for a whole process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GEOSTREAM_LOG": log}
    program = [sys.executable, "-m", "geostream", *words]
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120, check=False)


def made(name: str, message: str, **more: object) -> logging.LogRecord:
    return logging.makeLogRecord({"name": name, "levelname": "INFO", "msg": message, "created": 86400.25} | more)


def test_a_line_has_the_fields_that_it_was_logged_with() -> None:
    fields = {"stage": "train", "time": "of the record", "stream": {"retries": {"timeout": 2}}}
    line = json.loads(
        JsonLines().format(made("geostream.runs.loop", "train: …", fields=fields, flow_run_name="tall fox"))
    )
    assert line == {
        "time": "1970-01-02T00:00:00.250+00:00",
        "level": "INFO",
        "logger": "geostream.runs.loop",
        "message": "train: …",
        "stage": "train",
        "stream": {"retries": {"timeout": 2}},
        "flow_run_name": "tall fox",
    }


def test_a_traceback_stays_in_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        text = JsonLines().format(made("geostream", "it failed", exc_info=sys.exc_info()))
    assert "\n" not in text and "two\nlines" in json.loads(text)["traceback"]


def test_progress_is_a_line_for_people_or_for_a_collector(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_SECONDS", -1.0)
    monkeypatch.delenv("GEOSTREAM_LOG", raising=False)
    with Bar("epoch 1/2", 4) as bar:
        bar.advance(2, loss=0.25)
    assert capsys.readouterr().err == "epoch 1/2: 2/4  loss 0.25\n"
    monkeypatch.setenv("GEOSTREAM_LOG", "json")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with caplog.at_level(logging.INFO, "geostream"), Bar("epoch 1/2", 4) as bar:
        bar.advance(2, loss=0.25)
    assert capsys.readouterr().err == "", "a bar is drawn"
    [line] = caplog.records
    assert json.loads(JsonLines().format(line)).items() >= {"done": 2, "total": 4, "loss": 0.25}.items()


def test_another_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEOSTREAM_LOG", "xml")
    with pytest.raises(BadInput, match="GEOSTREAM_LOG=xml"):
        log_to_stderr()
    done = command("settings", log="xml")
    assert (
        done.returncode == 1 and done.stderr.startswith("geostream: GEOSTREAM_LOG=xml") and done.stderr.count("\n") == 1
    )


def test_the_error_of_a_command_is_a_line_of_json(tmp_path: Path) -> None:
    done = command("inspect", str(tmp_path / "nowhere"), log="json")
    [line] = map(json.loads, done.stderr.splitlines())
    assert done.returncode == 1 and set(line) == BASE
    assert line["level"] == "ERROR" and "nowhere" in line["message"]


def test_warnings_of_others_and_what_ends_a_process_are_lines_of_json() -> None:
    code = "import warnings; from geostream.progress import log_to_stderr; log_to_stderr(); warnings.warn('old'); 1 / 0"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GEOSTREAM_LOG": "json"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    warning, error = map(json.loads, done.stderr.splitlines())
    assert warning["level"] == "WARNING" and "old" in warning["message"]
    assert error["level"] == "CRITICAL" and "ZeroDivisionError" in error["traceback"] and done.returncode == 1


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
