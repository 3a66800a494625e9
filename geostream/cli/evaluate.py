"""Define the command ``evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from geostream.cli.options import (
    DEFAULT_RUN,
    Checkpoint,
    Cluster,
    Dataset,
    LayoutName,
    ModelName,
    RunName,
    Split,
    StoreUrl,
    check_split,
    open_trained,
    print_table,
)
from geostream.errors import BadInput


def evaluate(
    store: StoreUrl,
    run: RunName = DEFAULT_RUN,
    dataset: Dataset = None,
    layout: LayoutName = None,
    split: Split = "test",
    checkpoint: Checkpoint = None,
    model: ModelName = None,
    fov: Annotated[
        float,
        typer.Option(help="Narrow panoramas to so many degrees, as ordinary photos look, with random headings."),
    ] = 360.0,
    on: Annotated[
        list[str] | None, typer.Option("--on", help="Another data set of the store to test on; may be repeated.")
    ] = None,
    cluster: Cluster = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this local file, too.")] = None,
) -> None:
    """Evaluate a checkpoint or model by its dataset's protocols: print a table, write JSON and a page with pictures."""
    from geostream.report.evaluation_page import evaluate_checkpoint, metres_table, results_table
    from geostream.runs.galleries import tested_on

    if json_path is not None and (json_path.is_dir() or not json_path.parent.is_dir()):
        raise BadInput(f"--json {json_path}: {'a folder' if json_path.is_dir() else 'no such folder'}; name a file")
    split = check_split(split)
    if not 0 < fov <= 360:
        raise BadInput(f"--fov {fov:g}: degrees above 0 and up to 360")
    opened, checkpoint = open_trained(store, (dataset, layout, run), checkpoint, model, cluster)
    records = []
    for one in tested_on(opened, on or []):
        record = evaluate_checkpoint(one, split, checkpoint, fov)
        records.append(record)
        title = f"{one.layout.dataset} {one.layout.name}, {split} after epoch {record['epoch']}, in percent"
        print_table(title, results_table(one.layout, record))
        if metres := metres_table(record):
            print_table("on the ground, in percent", metres)
        name = one.evaluation_name(one.named_by_dataset(split), record["epoch"], fov)
        print(f"{one.url}/{name}.html and .json")
    if json_path is not None:
        json_path.write_text(json.dumps(records[0] if len(records) == 1 else records, indent=1) + "\n")
