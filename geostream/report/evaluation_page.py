"""Evaluating a checkpoint of a run, and what that leaves there: the results as JSON, and a page with pictures.

Decides that what the field prints is made in one place: a row for each protocol and direction, percent with two
decimals, the columns that the dataset's papers have. Embeddings of the checkpoint that are there already are used, so
that evaluating again, or on another machine, takes no network and no images.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from geostream.arrays import pair_codes
from geostream.errors import NotFound, StaleArtefact
from geostream.evaluation.embed import split_references
from geostream.evaluation.evaluate import evaluate_embeddings
from geostream.evaluation.metrics import named_rows
from geostream.evaluation.protocols import split_pairs
from geostream.layout import Layout
from geostream.mining.embeddings import Embeddings
from geostream.report.retrievals import STYLE, retrieval_section, retrievals
from geostream.runs import stages
from geostream.runs.run import Run

COLUMNS = {"r1": "R@1", "r5": "R@5", "r10": "R@10", "r1pct": "R@1%", "hit_rate": "hit rate", "ap": "AP"}


def evaluate_checkpoint(run: Run, split: str = "test", checkpoint: str | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint (None: the newest of a whole epoch) on a split; returns the record that was written.

    Leaves ``evaluation-<split>-epoch-NNNN.json`` and ``.html`` in the run.
    """
    trained = stages.load_trained(run, checkpoint)
    return write_evaluation(run, trained, embedded(run, trained, split))


def write_evaluation(run: Run, trained: stages.Trained, embeddings: Embeddings) -> dict[str, Any]:
    """Evaluate the embeddings and write both files; returns the record."""
    layout, split = run.layout, embeddings.split
    record = {"epoch": trained.epoch, "checkpoint": trained.checkpoint, "split": split, "layout": layout.name}
    record |= asdict(evaluate_embeddings(layout, embeddings, run.cluster))
    name = run.evaluation_name(split, trained.epoch)
    run.folder.write_json(f"{name}.json", record)
    title = f"{layout.dataset} {layout.name}: {split} after epoch {trained.epoch}"
    section = retrieval_section(retrievals(layout, embeddings))
    run.folder.write(f"{name}.html", _page(title, results_table(layout, record), section).encode())
    return record


def embedded(run: Run, trained: stages.Trained, split: str) -> Embeddings:
    """The embeddings of the split by this checkpoint: those in the run where they are whole, else made now."""
    try:
        found = run.embeddings(split, trained.epoch)
    except (NotFound, StaleArtefact):
        return _embed(run, trained, split)
    layout = run.layout
    whole = (
        (found.checkpoint, found.split) == (trained.checkpoint, split)
        and np.array_equal(pair_codes(*found.pairs), pair_codes(*split_pairs(layout, split)))
        and np.array_equal(found.reference_place, split_references(layout, split))
    )
    return found if whole else _embed(run, trained, split)


def _embed(run: Run, trained: stages.Trained, split: str) -> Embeddings:
    """Embed the split. Raises RunHeld beside a training of the run, which may be writing the same."""
    with run.hold():
        return stages.embed_split(run, trained, split)


def results_by_epoch(layout: Layout, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tables of a run's evaluations as one, with the epoch before each row."""
    return [{"epoch": record["epoch"], **row} for record in records for row in results_table(layout, record)]


def results_table(layout: Layout, record: Mapping[str, Any]) -> list[dict[str, str]]:
    """An evaluation's record as the field's table, rows of equal columns.

    Hit rate where the dataset has semi-positives, AP where a protocol asks for it; – where a row has no such number.
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


def _page(title: str, rows: Sequence[Mapping[str, str]], section: str) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
    title = html.escape(title)
    return f"""<!doctype html>
<html lang=en><head><meta charset=utf-8><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #eee }}
{STYLE}</style></head><body>
<h1>{title}</h1><p>Shares of queries in percent. Ties count against the model.</p>
<table><tr>{head}</tr>{body}</table>
{section}
</body></html>
"""
