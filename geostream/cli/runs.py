"""Define the commands ``runs``, which list a data set's runs, show one, and remove those that nobody needs."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

import typer

from geostream.cli.options import Dataset, StoreUrl, open_store, print_table

runs = typer.Typer(help="List a dataset's runs, show one, or remove those nobody needs.")


@runs.command("list")
def list_(store: StoreUrl, dataset: Dataset = None) -> None:
    """Show every run: its layout, how far it came, its best R@1, and what it takes on the store."""
    from geostream.runs.generations import check_dataset
    from geostream.runs.inventory import list_runs

    root = open_store(store)
    rows = [
        {
            "run": run.name,
            "layout": run.layout,
            "epochs": f"{run.epochs} of {run.wanted}" if run.wanted else str(run.epochs),
            "best R@1": None if run.r1 is None else f"{100 * run.r1:.1f} %",
            "state": run.state,
            "began (UTC)": _time(run.began),
            "ended (UTC)": None if run.state == "training" else _time(run.ended),
            "MB": f"{sum(run.bytes.values()) / 1e6:,.1f}",
            **{part: f"{size / 1e6:,.1f}" for part, size in run.bytes.items()},
        }
        for run in list_runs(root, check_dataset(root, dataset))
    ]
    print_table("runs, newest last; sizes in MB", rows)


@runs.command()
def show(
    store: StoreUrl, name: Annotated[str, typer.Argument(help="Name of the run.")], dataset: Dataset = None
) -> None:
    """Show one run: its settings that are not the recipe's, its evaluations, its layouts, times and sizes."""
    from geostream.runs.generations import check_dataset
    from geostream.runs.inventory import describe_run

    root = open_store(store)
    found = describe_run(root, check_dataset(root, dataset), name)
    run, result = found.summary, found.result
    print(f"{found.url}: {run.state}, {run.epochs} of {run.wanted or '?'} epochs, on layout {run.layout or '?'}")
    changed = [{"setting": one, "recipe": str(recipe), "run": str(value)} for one, recipe, value in found.changed]
    print_table("settings that differ from the recipe", changed)
    recalls = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "r1pct": "R@1 %", "hit_rate": "hit rate"}
    print_table(
        "evaluations, in percent",
        [
            {"epoch": row["epoch"]}
            | {label: None if row.get(key) is None else f"{100 * row[key]:.1f}" for key, label in recalls.items()}
            for row in result.evaluations
        ],
    )
    print_table(
        "layouts that it made", [{"epoch": row["epoch"], "layout": row["layout"]} for row in result.reclusterings]
    )
    print_table(
        "seconds of each stage",
        [
            {"stage": stage, "trainer": f"{value:,.1f}", "beside it": f"{result.beside.get(stage, 0.0):,.1f}"}
            for stage, value in result.seconds.items()
        ],
    )
    print_table("size in MB", [{part: f"{size / 1e6:,.1f}" for part, size in run.bytes.items()}])


@runs.command()
def prune(
    store: StoreUrl,
    dataset: Dataset = None,
    keep_last: Annotated[int, typer.Option(min=0, help="Keep so many of the newest.")] = 5,
    older_than: Annotated[
        float | None, typer.Option(min=0, help="Remove only what did nothing for so many days.")
    ] = None,
    keep: Annotated[list[str] | None, typer.Option(help="Name of a run to keep; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove old runs; never one that is being trained, or that the current model or the one before it came from."""
    from geostream.runs.generations import check_dataset
    from geostream.runs.inventory import prune_runs
    from geostream.runs.retention import Rule

    root = open_store(store)
    age = None if older_than is None else timedelta(days=older_than)
    rule = Rule(keep_last, age, frozenset(keep or ()))
    gone = "would be removed" if dry_run else "removed"
    for run in prune_runs(root, check_dataset(root, dataset), rule, dry_run=dry_run):
        print(f"{run.name}: {f'kept, {run.keep}' if run.keep else f'{gone}, {run.bytes} bytes'}")
        for path in run.left:
            print(f"  {path}: stays, it is not the run's")


def _time(when: datetime | None) -> str | None:
    return None if when is None else f"{when:%Y-%m-%d %H:%M}"
