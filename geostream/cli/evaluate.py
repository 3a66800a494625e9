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
        str | None,
        typer.Option(
            help="Narrow panoramas to so many degrees, as ordinary photos look, with random headings: one number or "
            "several, such as 70,90,180,360. Default: 360, and these four for a model trained with fov."
        ),
    ] = None,
    tta: Annotated[
        bool, typer.Option("--tta", help="Evaluate with similarities averaged over flips and turns, too.")
    ] = False,
    on: Annotated[
        list[str] | None, typer.Option("--on", help="Another data set of the store to test on; may be repeated.")
    ] = None,
    cluster: Cluster = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the results to this local file, too.")] = None,
) -> None:
    """Evaluate a checkpoint or model by its dataset's protocols: print a table, write JSON and a page with pictures."""
    from geostream.report import report
    from geostream.report.evaluation_page import evaluate_checkpoint, look_of, metres_table, results_table
    from geostream.runs.galleries import tested_on
    from geostream.runs.log import RunResult
    from geostream.runs.stages import BEST

    if json_path is not None and (json_path.is_dir() or not json_path.parent.is_dir()):
        raise BadInput(f"--json {json_path}: {'a folder' if json_path.is_dir() else 'no such folder'}; name a file")
    split = check_split(split)
    fovs = None if fov is None else _degrees(fov)
    if on and checkpoint is None and model is None:
        checkpoint = BEST  # that is what the report's table compares
    opened, checkpoint = open_trained(store, (dataset, layout, run), checkpoint, model, cluster)
    told = []
    for one in tested_on(opened, on or []):
        records = evaluate_checkpoint(one, split, checkpoint, fovs, tta)
        plain = next((record for record in records if look_of(record) == "360°"), records[0])
        others = [record for record in records if record is not plain]
        told.append(plain | ({"looks": others} if others else {}))
        title = f"{one.layout.dataset} {one.layout.name}, {split} after epoch {plain['epoch']}, in percent"
        looks = [({"views": look_of(record)} if others else {}, record) for record in records]
        print_table(title, [look | row for look, record in looks for row in results_table(one.layout, record)])
        if metres := [look | row for look, record in looks for row in metres_table(record)]:
            print_table("on the ground, in percent", metres)
        for record in records:
            look = record.get("fov", 360.0), record.get("tta", False)
            name = one.evaluation_name(one.named_by_dataset(split), record["epoch"], *look)
            print(f"{one.url}/{name}.html and .json")
    if on and model is None:
        result = RunResult.of(opened.url, opened.log, already_finished=True)
        report.publish(opened, result, report.summarise(opened.store.url, opened.layout, result))
        print(f"{opened.url}/report.html: has the table of what was tested")
    if json_path is not None:
        json_path.write_text(json.dumps(told[0] if len(told) == 1 else told, indent=1) + "\n")


def _degrees(text: str) -> list[float]:
    """Return the fields of view that were typed, without repeats, in their order."""
    try:
        found = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found or not all(0 < one <= 360 for one in found):
        raise BadInput(f"--fov {text}: degrees above 0 and up to 360, one number or several, such as 70,90,180,360")
    return list(dict.fromkeys(found))
