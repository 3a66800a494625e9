"""Define the commands ``indexes list`` and ``remove``; ``geostream index`` makes one."""

from __future__ import annotations

from typing import Annotated

import typer

from geostream.cli.options import Dataset, StoreUrl, open_store, print_table

indexes = typer.Typer(help="List the indexes that photos are located with, or remove one.")


@indexes.command("list")
def list_(store: StoreUrl, dataset: Dataset = None) -> None:
    """Show every index: of which tiles, by which model, and how many test photos are sure."""
    from geostream.locating.index import list_indexes
    from geostream.runs.generations import check_dataset

    root = open_store(store)
    rows = [
        {
            "index": info["name"],
            "layout": info["layout"]["name"],
            "tiles": f"{info['tiles']:,}",
            "model": info["model"]["number"],
            "run": info["model"]["run"],
            "checkpoint": info["model"]["checkpoint"],
            "sure": f"{info['calibration']['sure']:.1%}",
            "made": info["made"],
        }
        for info in list_indexes(root, check_dataset(root, dataset))
    ]
    print_table("indexes", rows)


@indexes.command()
def remove(
    store: StoreUrl, name: Annotated[str, typer.Argument(help="Name of the index.")], dataset: Dataset = None
) -> None:
    """Remove an index. The layout of its tiles stays, and may then be removed, too."""
    from geostream.locating.make import remove_index
    from geostream.runs.generations import check_dataset

    root = open_store(store)
    remove_index(root, check_dataset(root, dataset), name)
    print(f"{name}: removed")
