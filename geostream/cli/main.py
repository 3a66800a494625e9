"""The command line: each stage of the loop alone, on a store's URL.

Decides nothing that the library doesn't: every command opens what it needs, calls the function that flows and trainer
call, and prints what came out. Commands of the packages above this one (``shard``, ``demo``) join by the entry point
group ``geostream.commands``. An error meant for a person is one line on stderr and exit code 1.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import entry_points

import typer

from geostream.cli import evaluate, inspect, layouts, train
from geostream.errors import GeostreamError

app = typer.Typer(
    help="Train cross-view retrieval models on mined hard negatives, streamed from object storage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (
    inspect.inspect,
    inspect.verify,
    train.train,
    train.embed,
    train.mine,
    train.plan,
    evaluate.evaluate,
    layouts.recluster,
):
    app.command()(command)
app.add_typer(layouts.layouts, name="layouts")


def _join_commands(wanted: str) -> None:
    """Add our own from other files, and of the other packages' only the one wanted, or all for the list of commands.

    Loading one imports what it needs (Prefect, image formats), which no other command should wait for.
    """
    points = {point.name: point for point in entry_points(group="geostream.commands")}
    ours = {command.callback.__name__ for command in app.registered_commands if command.callback} | {"layouts"}
    for name in [wanted] if wanted in points else () if wanted in ours else points:
        app.command(name)(points[name].load())


def _log_to_stderr() -> None:
    """Our own log lines; not the root logger's, where every library's would come along."""
    for package in ("geostream", "sharding", "flows"):
        logger = logging.getLogger(package)
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)


def main() -> None:
    """Entry point of the ``geostream`` command."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    _log_to_stderr()
    _join_commands(sys.argv[1] if len(sys.argv) > 1 else "--help")
    try:
        app()
    except GeostreamError as error:
        print(f"geostream: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
