"""Define the commands on a layout's generations: ``recluster`` writes the next, ``layouts`` lists and removes them."""

from __future__ import annotations

from typing import Annotated

import typer

from geostream.cli.options import (
    Cluster,
    Dataset,
    LayoutName,
    Overrides,
    RunName,
    StoreUrl,
    open_store,
    print_table,
)

layouts = typer.Typer(help="List the generations of a dataset's layouts, or remove those nobody needs.")


def recluster(
    store: StoreUrl,
    run: RunName = "base",
    dataset: Dataset = None,
    layout: LayoutName = None,
    epoch: Annotated[int | None, typer.Option(help="Epoch of the embeddings; default: the newest.")] = None,
    overrides: Overrides = None,
    cluster: Cluster = None,
) -> None:
    """Rewrite a layout in the order of similarity, as its next generation. Cut off, it goes on when run again."""
    from geostream.layout import current_layout, open_layout
    from geostream.reclustering.recluster import describe
    from geostream.runs import stages
    from geostream.runs.run import Run
    from geostream.settings import parse_settings

    root = open_store(store)
    opened = Run(root, open_layout(root, dataset, layout), run, cluster)
    opened.settings = parse_settings(overrides or [], opened.settings_or_recipe())
    after = stages.recluster(opened, epoch)
    print_table("generations", describe(opened.layout, after))
    current = current_layout(root, opened.layout.dataset)
    if current is not None and current.id != after.id:
        print(f"{current.layout} stays the current layout, because {opened.layout.name} was not it")
    print(after.store.url)


@layouts.command("list")
def list_(store: StoreUrl, dataset: Dataset = None) -> None:
    """Show every generation, the runs that need it, and why it stays."""
    from geostream.runs.generations import check_dataset, list_generations

    root = open_store(store)
    rows = [
        {
            "layout": one.name,
            "generation": one.number,
            "parent": one.parent or None,
            "MB": f"{one.bytes / 1e6:,.1f}",
            "needed by runs": ", ".join(one.runs) or None,
            "stays because": one.keep or None,
        }
        for one in list_generations(root, check_dataset(root, dataset))
    ]
    print_table("layouts", rows)


@layouts.command()
def prune(
    store: StoreUrl,
    dataset: Dataset = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove the generations that have a committed descendant and that no run needs."""
    from geostream.runs.generations import check_dataset
    from geostream.runs.generations import prune as prune_layouts

    root = open_store(store)
    for one in prune_layouts(root, check_dataset(root, dataset), dry_run=dry_run):
        gone = "would be removed" if dry_run else "removed"
        print(f"{one.name}: {f'kept, {one.keep}' if one.keep else f'{gone}, {one.bytes} bytes'}")
