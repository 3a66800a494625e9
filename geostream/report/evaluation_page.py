"""Evaluate a checkpoint of a run, and write the results there as JSON and as an HTML page with pictures.

The table has a row for each protocol and direction, and the columns that the dataset's papers print: percent with two
decimals. Embeddings of the checkpoint that are in the run already are used again, so that a second evaluation runs no
network and reads only the images that the page shows.

Views can also be narrowed as ordinary photos are, and similarities averaged over flips and turns (TTA). Each is an
evaluation of its own, with files of its own, beside the plain one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from geostream.evaluation.embed import Trained
from geostream.evaluation.evaluate import evaluate_embeddings
from geostream.evaluation.metres import DEPTHS, MEDIAN, WITHIN, recall_name
from geostream.evaluation.metrics import named_rows
from geostream.layout import Layout
from geostream.mining.embeddings import Embeddings
from geostream.report.pages import render
from geostream.report.retrievals import retrievals
from geostream.runs import stages
from geostream.runs.galleries import note_tested
from geostream.runs.run import Run
from geostream.training.field_of_view import EVALUATED, WHOLE

COLUMNS = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "r1pct": "R@1%", "hit_rate": "hit rate", "ap": "AP"}


def evaluate_checkpoint(
    run: Run,
    split: str = "test",
    checkpoint: str | None = None,
    fovs: Sequence[float] | None = None,
    tta: bool = False,
) -> list[dict[str, Any]]:
    """Evaluate a checkpoint on a split and write ``evaluation-<split>-epoch-NNNN.json`` and ``.html`` into the run.

    With a field of view below 360 degrees the split is called ``<split>_fov90`` there, with TTA ``<split>_tta``, and on
    another data set than the run's own ``<split>_<dataset>``. What whole views of a test split gave without TTA is
    noted in the run's ``tested.json``, too, if the checkpoint is the run's best: others are not to be compared.

    Args:
        run: The run, on the layout to evaluate on (:mod:`geostream.runs.galleries`).
        split: Name of the split.
        checkpoint: Name of the checkpoint, or "best" for that of the best evaluation. None: the newest at the end of an
            epoch.
        fovs: Degrees that each view is narrowed to, with a random heading; 360 leaves it whole. None: whole, and 70, 90
            and 180 for a model that was trained with narrowed panoramas.
        tta: Also evaluate with similarities averaged over flips and turns, after the plain evaluations.

    Returns:
        The records that were written, one an evaluation: epoch, checkpoint, split, layout, what was done to the images
        (``fov``, ``tta``) and the metrics.

    Raises:
        BadInput: There is no such run, or it has no such checkpoint yet.
        RunHeld: The split must be embedded first, and a training of this run is at work.
    """
    trained = stages.load_trained(run, checkpoint)
    if fovs is None:
        fovs = EVALUATED if trained.settings.augment.narrows else (WHOLE,)
    records = [
        write_evaluation(run, one, stages.embedded(run, one, split, fov), fov)
        for one in (trained, *([replace(trained, tta=True)] if tta else []))
        for fov in fovs
    ]
    best = run.best()
    if split == "test" and best is not None and best["checkpoint"] == trained.checkpoint:
        plain = [one for one in records if look_of(one) == look_of({})]
        note_tested(run, trained.checkpoint, trained.epoch, [(run.layout, one) for one in plain])
    return records


def write_evaluation(run: Run, trained: Trained, embeddings: Embeddings, fov: float = WHOLE) -> dict[str, Any]:
    """Evaluate embeddings and write the JSON and the page.

    Args:
        run: The run.
        trained: Checkpoint that the embeddings were made with, and whether with TTA.
        embeddings: Embeddings of the split.
        fov: Degrees that the views were narrowed to.

    Returns:
        The record that was written to the JSON file.
    """
    layout, split = run.layout, embeddings.split
    record = {"epoch": trained.epoch, "checkpoint": trained.checkpoint, "split": split}
    record |= {"dataset": layout.dataset, "layout": layout.name}
    record |= ({"fov": fov} if fov < WHOLE else {}) | ({"tta": True} if trained.tta else {})
    record |= asdict(evaluate_embeddings(layout, embeddings, run.cluster))
    name = run.evaluation_name(run.named_by_dataset(split), trained.epoch, fov, trained.tta)
    run.folder.write_json(f"{name}.json", record)
    narrowed = f", narrowed to {fov:g}°" if fov < WHOLE else ""
    averaged = ", averaged over flips and turns" if trained.tta else ""
    title = f"{layout.dataset} {layout.name}: {split} after epoch {trained.epoch}{narrowed}{averaged}"
    page = render(
        "evaluation.html",
        title=title,
        rows=results_table(layout, record),
        metres=metres_table(record),
        retrievals=retrievals(layout, embeddings),
        imagery=layout.source,
    )
    run.folder.write(f"{name}.html", page.encode())
    return record


def look_of(record: Mapping[str, Any]) -> str:
    """Return what an evaluation did to the images, as a table says it: ``360°``, ``90°`` or ``360° TTA``.

    Args:
        record: Record of :func:`write_evaluation`.
    """
    return f"{record.get('fov', WHOLE):g}°{' TTA' if record.get('tta') else ''}"


def metres_table(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Format the figures on the ground as a table: a row for each k of R@k, in percent, and one for the median error.

    Args:
        record: Record of :func:`write_evaluation` or of the run log.

    Returns:
        The rows; none where nothing was measured on the ground. Of several data sets, those of each.
    """
    if "datasets" in record:
        return [{"data set": one["dataset"]} | row for one in record["datasets"] for row in metres_table(one)]
    measured = record.get("metres") or {}
    if not measured:
        return []
    rows = [
        {"": f"R@{depth}"}
        | {f"within {limit} m": f"{measured[recall_name(depth, limit)]:.2%}".removesuffix("%") for limit in WITHIN}
        | {"median error (m)": f"{measured[MEDIAN]:,.1f}" if depth == 1 else ""}
        for depth in DEPTHS
    ]
    return rows


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
        ({"data set": str(row["dataset"])} if "dataset" in row else {})
        | {"protocol": str(row["protocol"]), "direction": str(row["direction"])}
        | {COLUMNS[name]: f"{row[name]:.2%}".removesuffix("%") if name in row else "–" for name in shares}
        | {name: f"{row[name]:,}" for name in ("queries", "gallery")}
        for row in rows
    ]
