"""Evaluate a checkpoint of a run, and write the results there as JSON and as an HTML page with pictures.

The table has a row for each protocol and direction, and the columns that the dataset's papers print: percent with two
decimals. Embeddings of the checkpoint that are in the run already are used again, so that a second evaluation runs no
network and reads only the images that the page shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from geostream.evaluation.evaluate import evaluate_embeddings
from geostream.evaluation.metrics import named_rows
from geostream.layout import Layout
from geostream.mining.embeddings import Embeddings
from geostream.report.pages import render
from geostream.report.retrievals import retrievals
from geostream.runs import stages
from geostream.runs.run import Run

COLUMNS = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "r1pct": "R@1%", "hit_rate": "hit rate", "ap": "AP"}


def evaluate_checkpoint(run: Run, split: str = "test", checkpoint: str | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint on a split and write ``evaluation-<split>-epoch-NNNN.json`` and ``.html`` into the run.

    Args:
        run: The run.
        split: Name of the split.
        checkpoint: Name of the checkpoint, or "best" for that of the best evaluation. None: the newest at the end of an
            epoch.

    Returns:
        The record that was written: epoch, checkpoint, split, layout and the metrics.

    Raises:
        BadInput: There is no such run, or it has no such checkpoint yet.
        RunHeld: The split must be embedded first, and a training of this run is at work.
    """
    trained = stages.load_trained(run, checkpoint)
    return write_evaluation(run, trained, stages.embedded(run, trained, split))


def write_evaluation(run: Run, trained: stages.Trained, embeddings: Embeddings) -> dict[str, Any]:
    """Evaluate embeddings and write the JSON and the page.

    Args:
        run: The run.
        trained: Checkpoint that the embeddings were made with.
        embeddings: Embeddings of the split.

    Returns:
        The record that was written to the JSON file.
    """
    layout, split = run.layout, embeddings.split
    record = {"epoch": trained.epoch, "checkpoint": trained.checkpoint, "split": split, "layout": layout.name}
    record |= asdict(evaluate_embeddings(layout, embeddings, run.cluster))
    name = run.evaluation_name(split, trained.epoch)
    run.folder.write_json(f"{name}.json", record)
    title = f"{layout.dataset} {layout.name}: {split} after epoch {trained.epoch}"
    rows = results_table(layout, record)
    page = render(
        "evaluation.html", title=title, rows=rows, retrievals=retrievals(layout, embeddings), imagery=layout.source
    )
    run.folder.write(f"{name}.html", page.encode())
    return record


def results_by_epoch(layout: Layout, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join the tables of several evaluations, with the epoch as the first column.

    Args:
        layout: Layout that was evaluated on.
        records: Records of evaluations, as in the run log.
    """
    return [{"epoch": record["epoch"], **row} for record in records for row in results_table(layout, record)]


def results_table(layout: Layout, record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Format an evaluation's record as a table of the kind that papers print.

    Args:
        layout: Layout that was evaluated on.
        record: Record of :func:`write_evaluation` or of the run log.

    Returns:
        A row for each protocol and direction, all with the same columns, formatted. There is a column for the hit rate
        if the dataset has semi-positives, and one for AP if a protocol has it. A missing number is "–".
    """
    rows = named_rows(record)
    with_hit_rate = len(layout.semi_positives(str(record.get("split", "test"))).indices) > 0
    shares = [name for name in COLUMNS if (with_hit_rate if name == "hit_rate" else any(name in row for row in rows))]
    return [
        {"protocol": str(row["protocol"]), "direction": str(row["direction"])}
        | {COLUMNS[name]: f"{row[name]:.2%}".removesuffix("%") if name in row else "–" for name in shares}
        | {name: f"{row[name]:,}" for name in ("queries", "gallery")}
        for row in rows
    ]
