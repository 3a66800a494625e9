"""The commands of a run: ``train``, and each stage of its loop alone."""

from __future__ import annotations

from typing import Annotated

import typer

from geostream.cli.options import (
    Checkpoint,
    Cluster,
    Dataset,
    LayoutName,
    Overrides,
    Run,
    Split,
    StoreUrl,
    check_split,
    open_run,
    open_store,
    print_table,
    run_settings,
)
from geostream.errors import BadInput
from geostream.layout import open_layout
from geostream.settings import default_settings, parse_settings


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
    from geostream.report import report
    from geostream.report.evaluation_page import results_by_epoch
    from geostream.runs import stages
    from geostream.runs.loop import train as train_run
    from geostream.training.distributed import ProcessGroup

    with ProcessGroup.current() as group:
        root = open_store(store)
        opened = open_layout(root, dataset, layout)
        settings = parse_settings(overrides or [], default_settings(opened.dataset))
        result = train_run(root, opened, run, settings, cluster=cluster, group=group)
        if not group.is_main:
            return
        opened = stages.layout_of(root, opened, run)
        summary = report.summarise(root.url, opened, result)
        report.publish(stages.run_store(root, opened.dataset, run), opened, result, summary)
        print_table("recall on the test gallery, in percent", results_by_epoch(opened, result.evaluations))
        print(f"{'was finished before' if result.already_finished else 'trained'}; report: {result.url}/report.html")


def embed(
    store: StoreUrl,
    run: Run = "base",
    dataset: Dataset = None,
    layout: LayoutName = None,
    split: Split = "train",
    checkpoint: Checkpoint = None,
) -> None:
    """Embed a split with a checkpoint of the run, into Zarr."""
    from geostream.runs import stages
    from geostream.runs.lease import Lease

    opened, folder = open_run(store, dataset, layout, run)
    split = check_split(split)
    trained = stages.load_trained(folder, checkpoint)
    with Lease(folder):
        embeddings = stages.embed_split(folder, opened, trained, split)
    print(f"{len(embeddings.pairs)} queries, {len(embeddings.reference_place)} tiles: {folder.url}/{embeddings.name}")


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
    from geostream.mining.gps import build_gps_graph
    from geostream.reclustering.recluster import newest_embeddings
    from geostream.runs import stages
    from geostream.runs.lease import Lease

    opened, folder = open_run(store, dataset, layout, run)
    settings = run_settings(opened, folder, overrides)
    if kind not in ("gps", "visual"):
        raise BadInput(f"--kind {kind}: graphs are gps or visual")
    with Lease(folder):
        if kind == "gps":
            graph = build_gps_graph(folder, opened, settings.plan.neighbours)
        else:
            epoch = newest_embeddings(folder) if epoch is None else epoch
            graph = stages.mine(folder, opened, settings, epoch, cluster)
    how = ", ".join(f"{name} {value}" for name, value in graph.search.items())
    print(f"{len(graph.places)} places, {graph.k} neighbours each ({how}): {folder.url}/{graph.name}")


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
    from geostream.runs import stages
    from geostream.runs.lease import Lease

    opened, folder = open_run(store, dataset, layout, run)
    settings = run_settings(opened, folder, overrides)
    with Lease(folder):
        made = stages.plan_epoch(folder, opened, settings, epoch, cluster)
    print_table(f"plan of epoch {epoch}", [{"source": made.source, **made.quality}])
    print(f"{folder.url}/plans/epoch-{epoch:04d}.parquet")
