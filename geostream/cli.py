"""The command line: each stage of the loop alone, on a store's URL.

Decides nothing that the library doesn't: every command opens what it needs, calls the function that flows and trainer
call, and prints what came out. Commands of the packages above this one (``shard``, ``demo``) join by the entry point
group ``geostream.commands``. An error meant for a person is one line on stderr and exit code 1.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from geostream.errors import BadInput, GeostreamError, StoreError
from geostream.layout import Layout, list_datasets, list_layouts, open_layout
from geostream.layout_files import ADVICE
from geostream.settings import TrainSettings, default_settings, parse_settings
from geostream.store import Store

app = typer.Typer(
    help="Train cross-view retrieval models on mined hard negatives, streamed from object storage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

StoreUrl = Annotated[str, typer.Argument(help="s3://bucket/prefix or a local folder.")]
Dataset = Annotated[str | None, typer.Option(help="Which dataset of the store; default: the only one.")]
LayoutName = Annotated[str | None, typer.Option("--layout", help="Which layout; default: the newest generation.")]
Run = Annotated[str, typer.Option(help="Name of the run.")]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="A setting, name=value; may be repeated.")]
Split = Annotated[str, typer.Option(help="train or test.")]
Checkpoint = Annotated[str | None, typer.Option(help="Default: the newest.")]
Cluster = Annotated[str | None, typer.Option(help="URL of a Dask scheduler; default: this process.")]


@app.command()
def inspect(store: StoreUrl, dataset: Dataset = None, layout: LayoutName = None) -> None:
    """Show what is in a store: its datasets and layouts, or one layout in detail."""
    root = open_store(store, write=False, listed=not (dataset and layout))
    datasets = [dataset] if dataset else list_datasets(root)
    names = [(d, n) for d in datasets for n in ([layout] if layout else list_layouts(root, d))]
    if not names:
        raise BadInput(f"{root.url}: no committed layout; shard one first: geostream shard vigor RAW {root.url}")
    layouts = [open_layout(root, d, n) for d, n in names]
    print_table("layouts", [_layout_row(one) for one in layouts])
    if len(layouts) != 1:
        return
    [one] = layouts
    images = one.members.group_by("member").aggregate([("size", "count"), ("size", "mean")]).to_pylist()
    rows = sorted(images, key=lambda row: str(row["member"]))
    print_table(
        "members", [{"member": r["member"], "count": r["size_count"], "mean bytes": r["size_mean"]} for r in rows]
    )
    for key in ("id", "source", "images", "broken"):
        Console().print(f"{key}: {one.info[key]}", highlight=False, markup=False)


@app.command()
def verify(store: StoreUrl, dataset: Dataset = None, layout: LayoutName = None) -> None:
    """Read every shard of a layout once and compare it with the index; damage is named, and exits with 1."""
    from geostream.verify import verify_layout

    opened = open_layout(open_store(store, write=False, listed=not (dataset and layout)), dataset, layout)
    found = verify_layout(opened)
    for line in found.problems:
        print(line)
    if found.count > len(found.problems):
        print(f"… and {found.count - len(found.problems)} more")
    if found.count:
        raise StoreError(f"{opened.store.url}: {found.count} problems; {ADVICE}")
    print(f"{found.shards} shards, {found.members} members, {found.bytes} bytes: all as committed")


@app.command()
def train(
    store: StoreUrl,
    run: Run = "base",
    dataset: Dataset = None,
    layout: LayoutName = None,
    overrides: Overrides = None,
    cluster: Cluster = None,
) -> None:
    """Train on a layout: plan, stream, train, mine, evaluate. A run that was cut off goes on.

    On several GPUs: torchrun --nproc-per-node N -m -- geostream train …
    """
    from geostream import report
    from geostream.evaluations import results_by_epoch
    from geostream.training import stages
    from geostream.training.group import Group
    from geostream.training.trainer import train as train_run

    with Group.current() as group:
        root = open_store(store)
        opened = open_layout(root, dataset, layout)
        settings = parse_settings(overrides or [], default_settings(opened.dataset))
        result = train_run(root, opened, run, settings, cluster=cluster, group=group)
        if not group.is_first:
            return
        opened = stages.layout_of(root, opened, run)
        summary = report.summarise(root.url, opened, result)
        report.publish(stages.run_store(root, opened.dataset, run), opened, result, summary)
        print_table("recall on the test gallery, in percent", results_by_epoch(opened, result.evaluations))
        print(f"{'was finished before' if result.already_finished else 'trained'}; report: {result.url}/report.html")


@app.command()
def embed(
    store: StoreUrl,
    run: Run = "base",
    dataset: Dataset = None,
    layout: LayoutName = None,
    split: Split = "train",
    checkpoint: Checkpoint = None,
) -> None:
    """Embed a split with a checkpoint of the run, into Zarr."""
    from geostream.training import stages
    from geostream.training.lease import Lease

    opened, folder = open_run(store, dataset, layout, run)
    split = check_split(split)
    trained = stages.load_trained(folder, checkpoint)
    with Lease(folder):
        embeddings = stages.embed_split(folder, opened, trained, split)
    print(f"{len(embeddings.pairs)} queries, {len(embeddings.reference_place)} tiles: {folder.url}/{embeddings.name}")


@app.command()
def mine(
    store: StoreUrl,
    run: Run = "base",
    dataset: Dataset = None,
    layout: LayoutName = None,
    kind: Annotated[str, typer.Option(help="gps: by distance; visual: by similarity of the embeddings.")] = "visual",
    epoch: Annotated[int | None, typer.Option(help="Epoch of the embeddings; default: the newest.")] = None,
    overrides: Overrides = None,
    cluster: Cluster = None,
) -> None:
    """Build a neighbour graph of the training places."""
    from geostream.mining.neighbours import build_gps_graph
    from geostream.recluster import newest_embeddings
    from geostream.training import stages
    from geostream.training.lease import Lease

    opened, folder = open_run(store, dataset, layout, run)
    settings = run_settings(opened, folder, overrides)
    if kind not in ("gps", "visual"):
        raise BadInput(f"--kind {kind}: graphs are gps or visual")
    with Lease(folder):
        if kind == "gps":
            graph = build_gps_graph(folder, opened, settings.neighbours)
        else:
            epoch = newest_embeddings(folder) if epoch is None else epoch
            graph = stages.mine(folder, opened, settings, epoch, cluster)
    how = ", ".join(f"{name} {value}" for name, value in graph.search.items())
    print(f"{len(graph.places)} places, {graph.k} neighbours each ({how}): {folder.url}/{graph.name}")


@app.command()
def plan(
    store: StoreUrl,
    epoch: Annotated[int, typer.Option(help="The epoch to plan, counted from 1.")],
    run: Run = "base",
    dataset: Dataset = None,
    layout: LayoutName = None,
    overrides: Overrides = None,
    cluster: Cluster = None,
) -> None:
    """Plan an epoch from the graph that is due, and show the plan's quality."""
    from geostream.training import stages
    from geostream.training.lease import Lease

    opened, folder = open_run(store, dataset, layout, run)
    settings = run_settings(opened, folder, overrides)
    with Lease(folder):
        made = stages.plan_epoch(folder, opened, settings, epoch, cluster)
    print_table(f"plan of epoch {epoch}", [{"source": made.source, **made.quality}])
    print(f"{folder.url}/plans/epoch-{epoch:04d}.parquet")


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal columns as a table on stdout; shares between 0 and 1 with three decimals."""
    table = Table(title=title, title_justify="left")
    for name in rows[0] if rows else []:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else "–" if v is None else str(v) for v in row.values()))
    # As wide as it needs to be where nobody looks: a log or a pipe.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _layout_row(layout: Layout) -> dict[str, object]:
    return {
        "dataset": layout.dataset,
        "layout": layout.name,
        "generation": layout.generation,
        "places": layout.n_places,
        "train pairs": layout.info["pairs"].get("train", 0),
        "test pairs": layout.info["pairs"].get("test", 0),
        "shards": len(layout.shard_names),
        "MB": f"{layout.shard_sizes.sum() / 1e6:,.1f}",
        "broken": len(layout.info["broken"]),
    }


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


def open_run(url: str, dataset: str | None, layout: str | None, run: str) -> tuple[Layout, Store]:
    """The layout (if none is named, the generation that the run reads) and the run's folder."""
    from geostream.training import stages

    root = open_store(url)
    opened = open_layout(root, dataset, layout)
    if layout is None:
        opened = stages.layout_of(root, opened, run)
    return opened, stages.run_store(root, opened.dataset, run)


def run_settings(layout: Layout, run: Store, overrides: list[str] | None) -> TrainSettings:
    """The settings of the run where there is one, else the dataset's, with the overrides on top."""
    from geostream.training import stages

    return parse_settings(overrides or [], stages.settings_of(run, layout.dataset))


def check_split(split: str) -> str:
    """The split as it was typed, if there is one of that name."""
    if split not in ("train", "test"):
        raise BadInput(f"--split {split}: train or test")
    return split


def _join_commands(wanted: str) -> None:
    """Add our own from other files, and of the other packages' only the one wanted, or all for the list of commands.

    Loading one imports what it needs (Prefect, image formats), which no other command should wait for.
    """
    points = {point.name: point for point in entry_points(group="geostream.commands")}
    from geostream import cli_evaluate, cli_layouts  # they take their options from here

    app.command()(cli_evaluate.evaluate)
    app.command()(cli_layouts.recluster)
    app.add_typer(cli_layouts.layouts, name="layouts")
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
