"""Define the arguments that several commands take, and open what they name: a store, a layout, a run.

The modules of the commands import the library inside their functions, so that ``--help`` need not wait for it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from geostream.dask import scheduler_url
from geostream.errors import BadInput

if TYPE_CHECKING:
    from geostream.runs.run import Run
    from geostream.store import Store

DEFAULT_RUN = "base"
StoreUrl = Annotated[str, typer.Argument(help="s3://bucket/prefix or a local folder.")]
Dataset = Annotated[str | None, typer.Option(help="Which dataset of the store; default: the only one.")]
LayoutName = Annotated[
    str | None, typer.Option("--layout", help="Name or tag of a layout; default: the run's, else the current one.")
]
RunName = Annotated[str, typer.Option("--run", help="Name of the run.")]
Recipe = Annotated[
    str | None,
    typer.Option(help="A recipe (geostream settings lists them) instead of the dataset's own, for a run that begins."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="A setting, name=value (geostream settings lists them); may be repeated."),
]
Split = Annotated[str, typer.Option(help="train or test.")]
Checkpoint = Annotated[str | None, typer.Option(help="Default: the newest.")]
ModelName = Annotated[
    str | None, typer.Option("--model", help="A promoted model instead of a run: current, or its number.")
]
Cluster = Annotated[
    str | None,
    typer.Option(callback=scheduler_url, help="URL of a Dask scheduler; default: $DASK_SCHEDULER_ADDRESS, else none."),
]


def open_store(url: str, *, write: bool = True, listed: bool = True) -> Store:
    """Open a store and make one request to it, so that an error shows before any work.

    Args:
        url: as the person typed it.
        write: whether the command writes, which not every kind of store can do.
        listed: whether names are to be found by listing, which not every store allows.

    Raises:
        BadInput: the URL is malformed.
        StoreError: the store cannot be reached, or cannot do what the command needs.
    """
    from geostream.store import Store

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
    """Open a run.

    Args:
        url: of the store, as the person typed it.
        dataset: None: the only one in the store.
        layout: name or tag of the layout that the run is opened on. None: the one that the run reads; of a new run
            the current one.
        name: of the run.
        cluster: URL of a Dask scheduler. None: this process.
        overrides: settings, as they were typed, that replace the run's own for this command. None: keep them.

    Raises:
        BadInput: a name or setting is unknown.
        StoreError: the store cannot be reached.
    """
    from geostream.runs.run import Run
    from geostream.settings import parse_settings

    run = Run.find(open_store(url), dataset, layout, name, cluster)
    if overrides is not None:
        run.settings = parse_settings(overrides, run.settings_or_recipe())
    return run


def open_trained(
    url: str, names: tuple[str | None, str | None, str], checkpoint: str | None, model: str | None, cluster: str | None
) -> tuple[Run, str | None]:
    """Open what is to be embedded or evaluated with: a checkpoint of a run, or a model.

    Args:
        url: of the store, as the person typed it.
        names: of the data set, the layout and the run, as for :func:`open_run`.
        checkpoint: name of a checkpoint of the run.
        model: "current" or a number, instead of run and checkpoint.
        cluster: URL of a Dask scheduler. None: this process.

    Returns:
        The run, or the model's folder as a run, and the name of the checkpoint. None: the newest.

    Raises:
        BadInput: a name is unknown, or both a run's checkpoint and a model are named.
        StoreError: the store cannot be reached.
    """
    from geostream.layout import open_layout
    from geostream.runs.models import open_model

    dataset, layout, run = names
    if model is None:
        return open_run(url, dataset, layout, run, cluster), checkpoint
    if run != DEFAULT_RUN or checkpoint is not None:
        raise BadInput(f"--model {model}: name either a model, or a run and its checkpoint")
    root = open_store(url)
    opened, found = open_model(root, open_layout(root, dataset, layout), model, cluster)
    return opened, found.checkpoint


def check_split(split: str) -> str:
    """Return the split's name; raise BadInput for one that is neither train nor test."""
    if split not in ("train", "test"):
        raise BadInput(f"--split {split}: train or test")
    return split


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table on stdout.

    Args:
        title: line above the table.
        rows: all with the same columns. Floats are shown with three decimals, None as "–".
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in rows[0] if rows else []:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else "–" if v is None else str(v) for v in row.values()))
    # A log or a pipe has no width of its own.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
