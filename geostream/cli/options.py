"""Arguments that several commands take, and what they open: a store, a layout, a run."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from geostream.errors import BadInput
from geostream.layout import open_layout
from geostream.settings import parse_settings
from geostream.store import Store

if TYPE_CHECKING:
    from geostream.runs.run import Run

StoreUrl = Annotated[str, typer.Argument(help="s3://bucket/prefix or a local folder.")]
Dataset = Annotated[str | None, typer.Option(help="Which dataset of the store; default: the only one.")]
LayoutName = Annotated[str | None, typer.Option("--layout", help="Which layout; default: the newest generation.")]
RunName = Annotated[str, typer.Option("--run", help="Name of the run.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="A setting, name=value; may be repeated.")]
Split = Annotated[str, typer.Option(help="train or test.")]
Checkpoint = Annotated[str | None, typer.Option(help="Default: the newest.")]
Cluster = Annotated[str | None, typer.Option(help="URL of a Dask scheduler; default: this process.")]


def open_store(url: str, *, write: bool = True, listed: bool = True) -> Store:
    """Open the store at ``url`` and look at it once, so that what is wrong with it is told before any work.

    Args:
        url: as the person typed it.
        write: whether the command writes, which not every kind of store can do.
        listed: whether names are to be found by listing, which not every store allows.
    """
    store = Store.open(url)
    if listed or store.is_local:
        store.check(write=write)
    return store


def open_run(
    url: str,
    dataset: str | None,
    layout: str | None,
    name: str,
    cluster: str | None = None,
    overrides: list[str] | None = None,
) -> Run:
    """Return the run on the layout named; if none is, on the generation that it reads.

    ``overrides``: settings that this command is to use in place of the run's own, as they were typed.
    """
    from geostream.runs.run import Run

    root = open_store(url)
    opened = open_layout(root, dataset, layout)
    run = Run.open(root, opened, name, cluster) if layout is None else Run(root, opened, name, cluster)
    if overrides is not None:
        run.settings = parse_settings(overrides, run.settings_or_recipe())
    return run


def check_split(split: str) -> str:
    """The split as it was typed, if there is one of that name."""
    if split not in ("train", "test"):
        raise BadInput(f"--split {split}: train or test")
    return split


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal columns as a table on stdout; shares between 0 and 1 with three decimals."""
    table = Table(title=title, title_justify="left")
    for name in rows[0] if rows else []:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else "–" if v is None else str(v) for v in row.values()))
    # As wide as it needs to be where nobody looks: a log or a pipe.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
