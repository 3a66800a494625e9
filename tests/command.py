"""The command ``geostream`` within the tests' own process: starting Python and torch for each would take minutes."""

from __future__ import annotations

import io
import logging
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from geostream.cli.main import main


def geostream(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the command; its exit code and what it printed."""
    stdout, stderr = io.StringIO(), io.StringIO()
    loggers = [logging.getLogger(name) for name in ("geostream", "sharding", "flows")]
    before = [list(logger.handlers) for logger in loggers]
    code: object = 0
    try:
        with patch("sys.argv", ["geostream", *words]), redirect_stdout(stdout), redirect_stderr(stderr):
            main()
    except SystemExit as error:
        code = error.code or 0
    finally:
        for logger, handlers in zip(loggers, before, strict=True):
            logger.handlers[:] = handlers
    return subprocess.CompletedProcess(["geostream", *words], int(str(code)), stdout.getvalue(), stderr.getvalue())


def said(*words: str) -> str:
    """What a command that works prints."""
    done = geostream(*words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*words: str) -> str:
    """The one line on stderr of a command that fails."""
    done = geostream(*words)
    assert done.returncode == 1, done.stdout
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("geostream: ")
    return line
