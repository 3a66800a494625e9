"""Define the commands on layouts: ``recluster`` writes the next one, ``layouts`` lists, chooses and removes them."""

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
from geostream.errors import BadInput

layouts = typer.Typer(help="List a dataset's layouts, choose the current one, and remove those nobody needs.")
Name = Annotated[str, typer.Argument(help="Name or tag of the layout.")]


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
    """Show every layout: which one is current, how it was made, what it takes, and why it stays."""
    from geostream.runs.generations import check_dataset, list_generations

    root = open_store(store)
    rows = [
        {
            "layout": f"{one.name} (current)" if one.is_current else one.name,
            "tags": ", ".join(one.tags) or None,
            "made": one.kind,
            "from": one.parent[:12] or None,
            "places": one.places,
            "gallery": one.gallery and one.gallery[:8],
            "own MB": f"{one.bytes / 1e6:,.1f}",
            "borrowed MB": f"{one.borrowed / 1e6:,.1f}" if one.borrowed else None,
            "needed by runs": ", ".join(one.runs) or None,
            "stays because": one.keep or None,
        }
        for one in list_generations(root, check_dataset(root, dataset))
    ]
    print_table("layouts", rows)


@layouts.command()
def join(
    store: StoreUrl,
    dataset: Annotated[str, typer.Argument(help="Name of the joined data set.")],
    of: Annotated[
        list[str], typer.Option("--of", help="A data set, or one of its layouts as DATASET/LAYOUT; given for each.")
    ],
) -> None:
    """Join layouts of several data sets, so that a run trains on all of them. Images stay where they are."""
    from geostream.layout import current_layout, open_layout
    from geostream.layout.join import join_layouts

    root = open_store(store)
    layouts = []
    for text in of:
        name, slash, layout = text.partition("/")
        if slash and not layout:
            raise BadInput(f"--of {text}: no layout is named after the slash; write {name} for its current one")
        layouts.append(open_layout(root, name, layout or None))
    made, already = join_layouts(root, dataset, layouts)
    rows = [
        {"data set": one.dataset, "layout": one.layout, "places": one.places, "coordinates": one.coordinates}
        for one in made.joined
    ]
    print_table("was there already" if already else "joined", rows)
    current = current_layout(root, dataset)
    if current is not None and current.id != made.id:
        use = f"geostream layouts use {root.url} {made.name} --dataset {dataset}"
        print(f"{current.layout} is the current layout of {dataset}; to make it this one: {use}")
    else:
        print(f"{made.name} is the current layout of {dataset}")
    print(made.store.url)


@layouts.command()
def use(store: StoreUrl, name: Name, dataset: Dataset = None) -> None:
    """Make a layout the current one: it is opened wherever no layout is named."""
    from geostream.layout import use_layout
    from geostream.runs.generations import check_dataset

    root = open_store(store)
    chosen = use_layout(root, check_dataset(root, dataset), name)
    print(f"{chosen.layout} is the current layout; runs that were begun stay on their own")


@layouts.command()
def tag(
    store: StoreUrl,
    name: Name,
    tag: Annotated[str, typer.Argument(help="Another name for it.")],
    dataset: Dataset = None,
) -> None:
    """Give a layout a tag. It can be named by it, and is not removed as long as it has one."""
    from geostream.layout import open_layout
    from geostream.layout.tags import tag_layout
    from geostream.runs.generations import check_dataset

    root = open_store(store)
    layout = open_layout(root, check_dataset(root, dataset), name)
    tag_layout(root, layout, tag)
    print(f"{layout.name} has the tag {tag}")


@layouts.command()
def untag(
    store: StoreUrl, tag: Annotated[str, typer.Argument(help="The tag to take away.")], dataset: Dataset = None
) -> None:
    """Take a tag away from the layout that has it."""
    from geostream.layout.tags import untag as untag_layout
    from geostream.runs.generations import check_dataset

    root = open_store(store)
    print(f"{untag_layout(root, check_dataset(root, dataset), tag)} no longer has the tag {tag}")


@layouts.command()
def diff(
    store: StoreUrl,
    before: Annotated[str, typer.Argument(help="Name or tag of the older layout.")],
    after: Annotated[str, typer.Argument(help="Name or tag of the newer layout.")],
    dataset: Dataset = None,
) -> None:
    """Show which places came, went and changed from one layout to another."""
    from geostream.layout import open_layout
    from geostream.layout.diff import diff_layouts
    from geostream.runs.generations import check_dataset

    root = open_store(store)
    dataset = check_dataset(root, dataset)
    found = diff_layouts(*(open_layout(root, dataset, name) for name in (before, after)))
    rows = [
        {"places": what, "count": places.count, "the first": ", ".join(places.first) or None}
        for what, places in (("came", found.came), ("went", found.went), ("changed", found.changed))
    ]
    print_table(f"from {before} to {after}", rows)
    figures = {f"{split} pairs": pairs for split, pairs in found.pairs.items()} | {"bytes": found.bytes}
    print_table("figures", [{"": name, before: f"{a:,}", after: f"{b:,}"} for name, (a, b) in figures.items()])
    print(f"{after}: {found.own} shards of its own ({found.own_bytes / 1e6:,.1f} MB), {found.borrowed} borrowed")
    same = {True: "the same", False: "another: figures on it cannot be compared", None: "not named by both"}
    print(f"test gallery: {same[found.same_gallery]}")


@layouts.command()
def remove(store: StoreUrl, name: Name, dataset: Dataset = None) -> None:
    """Remove one layout. Refused if it is current or tagged, or if a run, a model or another layout needs it."""
    from geostream.runs.generations import check_dataset
    from geostream.runs.generations import remove as remove_layout

    root = open_store(store)
    gone = remove_layout(root, check_dataset(root, dataset), name)
    print(f"{gone.name}: removed, {gone.bytes} bytes")


@layouts.command()
def prune(
    store: StoreUrl,
    dataset: Dataset = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove the layouts that another one descends from and that nobody needs."""
    from geostream.runs.generations import check_dataset
    from geostream.runs.generations import prune as prune_layouts

    root = open_store(store)
    for one in prune_layouts(root, check_dataset(root, dataset), dry_run=dry_run):
        gone = "would be removed" if dry_run else "removed"
        print(f"{one.name}: {f'kept, {one.keep}' if one.keep else f'{gone}, {one.bytes} bytes'}")
