"""Assemble the command line ``geostream``, which runs each stage of the loop alone.

A command opens what it needs, calls the function that flows and training call, and prints the result. Commands of the
packages above this one (``shard``, ``demo``) join by the entry point group ``geostream.commands``. Modules of commands
import the library inside their functions, so that ``--help`` takes a fraction of a second. A
:class:`~geostream.errors.GeostreamError` becomes one line on stderr and exit code 1.
"""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer

from geostream import __version__
from geostream.cli import (
    cost,
    evaluate,
    export,
    indexes,
    inspect,
    layouts,
    locate,
    models,
    runs,
    serve,
    settings,
    train,
)
from geostream.errors import GeostreamError
from geostream.progress import LOG_VARIABLE, log_to_stderr

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
    locate.locate,
    serve.serve,
    export.export,
    layouts.recluster,
    settings.settings,
    cost.cost,
):
    app.command()(command)
app.add_typer(layouts.layouts, name="layouts")
app.add_typer(indexes.indexes, name="indexes")
app.add_typer(models.models, name="models")
app.add_typer(runs.runs, name="runs")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"geostream {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def _join_commands() -> None:
    """Add the commands that other packages register as entry points."""
    ours = {command.name for command in app.registered_commands}
    for point in entry_points(group="geostream.commands"):
        if point.name not in ours:
            app.command(point.name)(point.load())


def main() -> None:
    """Run the command ``geostream``."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    try:
        log_to_stderr()
        _join_commands()
        app()
    except GeostreamError as error:
        if os.environ.get(LOG_VARIABLE) == "json":
            logging.getLogger("geostream").error("%s", error)
        else:
            print(f"geostream: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
