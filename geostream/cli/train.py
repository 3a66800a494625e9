"""Define the command ``train``, and those that run one stage of its loop: ``embed``, ``mine`` and ``plan``."""

from __future__ import annotations

from typing import Annotated

import typer

from geostream.cli.options import (
    DEFAULT_RUN,
    Checkpoint,
    Cluster,
    Dataset,
    LayoutName,
    ModelName,
    Overrides,
    Recipe,
    RunName,
    Split,
    StoreUrl,
    check_split,
    open_run,
    open_store,
    open_trained,
    print_table,
)
from geostream.errors import BadInput


def train(
    store: StoreUrl,
    run: RunName = "base",
    dataset: Dataset = None,
    layout: LayoutName = None,
    recipe: Recipe = None,
    overrides: Overrides = None,
    cluster: Cluster = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show steps, memory and hours; nothing is trained or written.")
    ] = False,
    rate: Annotated[
        float | None, typer.Option(min=1e-3, help="Pairs a second, on all GPUs together, for the hours of --dry-run.")
    ] = None,
) -> None:
    """Train on a layout: plan, stream, train, mine, evaluate. Cut off, a run goes on when started again.

    On several GPUs: torchrun --nproc-per-node N -m -- geostream train …
    """
    from geostream.cli.dry_run import foresee
    from geostream.report import report
    from geostream.report.evaluation_page import results_by_epoch
    from geostream.runs.loop import train as train_run
    from geostream.runs.run import Run
    from geostream.settings import default_settings, parse_settings
    from geostream.training.distributed import ProcessGroup

    if rate is not None and not dry_run:
        raise BadInput("--rate: is for --dry-run")
    with ProcessGroup.current() as group:
        root = open_store(store, write=not dry_run)
        opened = Run.find(root, dataset, layout, run).layout
        settings = parse_settings(overrides or [], default_settings(opened.dataset, recipe))
        if dry_run:
            if group.is_main:
                foresee(opened, settings, group.ranks, rate)
            return
        result = train_run(root, opened, run, settings, cluster=cluster, group=group)
        if not group.is_main:
            return
        trained = Run.open(root, opened, run)
        report.publish(trained, result, report.summarise(root.url, trained.layout, result))
        print_table("recall on the test gallery, in percent", results_by_epoch(trained.layout, result.evaluations))
        print(f"{'was finished before' if result.already_finished else 'trained'}; report: {result.url}/report.html")


def embed(
    store: StoreUrl,
    run: RunName = DEFAULT_RUN,
    dataset: Dataset = None,
    layout: LayoutName = None,
    split: Split = "train",
    checkpoint: Checkpoint = None,
    model: ModelName = None,
) -> None:
    """Embed a split with a checkpoint of the run, or a model, and store the vectors as Zarr."""
    from geostream.runs import stages

    opened, checkpoint = open_trained(store, (dataset, layout, run), checkpoint, model, None)
    split = check_split(split)
    trained = stages.load_trained(opened, checkpoint)
    with opened.hold():
        embeddings = stages.embed_split(opened, trained, split)
    print(f"{len(embeddings.pairs)} queries, {len(embeddings.reference_place)} tiles: {opened.url}/{embeddings.name}")


def mine(
    store: StoreUrl,
    run: RunName = "base",
    dataset: Dataset = None,
    layout: LayoutName = None,
    kind: Annotated[str, typer.Option(help="gps: by distance; visual: by similarity of the embeddings.")] = "visual",
    epoch: Annotated[int | None, typer.Option(help="Epoch of the embeddings; default: the newest.")] = None,
    overrides: Overrides = None,
    cluster: Cluster = None,
) -> None:
    """Build a neighbour graph of the training places."""
    from geostream.runs import stages

    opened = open_run(store, dataset, layout, run, cluster, overrides or [])
    if kind not in ("gps", "visual"):
        raise BadInput(f"--kind {kind}: graphs are gps or visual")
    if kind == "gps":
        epoch = 0
    elif epoch is None:
        epoch = opened.newest_embeddings()
    with opened.hold():
        graph = stages.mine(opened, epoch)
    how = ", ".join(f"{name} {value}" for name, value in graph.search.items())
    print(f"{len(graph.places)} places, {graph.k} neighbours each ({how}): {opened.url}/{graph.name}")


def plan(
    store: StoreUrl,
    epoch: Annotated[int, typer.Option(help="The epoch to plan, counted from 1.")],
    run: RunName = "base",
    dataset: Dataset = None,
    layout: LayoutName = None,
    overrides: Overrides = None,
    cluster: Cluster = None,
) -> None:
    """Plan an epoch from the graph that is due, and show the plan's quality."""
    from geostream.planning.plan import plan_name
    from geostream.runs import stages

    opened = open_run(store, dataset, layout, run, cluster, overrides or [])
    with opened.hold():
        made = stages.plan_epoch(opened, epoch)
    print_table(f"plan of epoch {epoch}", [{"source": made.source, **made.quality}])
    print(f"{opened.plans.url}/{plan_name(epoch)}.parquet")
