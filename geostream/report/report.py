"""Write the report of a run: one HTML file with its curves, its tables and pictures.

The order is that of a reader's questions: the recall on unseen places, how training went, what the model retrieves,
which training pairs may be wrong, what the network was given, and what it cost. The file holds its pictures itself, so
that it can be sent around.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from geostream.evaluation.metres import MEDIAN, WITHIN, recall_name
from geostream.evaluation.metrics import named_rows, row_name
from geostream.evaluation.protocols import BOTH_WAYS, NEAR, PAIRED
from geostream.layout import Layout
from geostream.report.augmentations import PreviewPair, preview_pairs, preview_rows
from geostream.report.comparison import comparison_section
from geostream.report.curves import Rows, curves_svg
from geostream.report.evaluation_page import COLUMNS
from geostream.report.pages import render
from geostream.report.retrievals import Retrieval, retrievals
from geostream.report.suspicious import Suspicion, find_suspicious
from geostream.report.timeline import timeline_svg
from geostream.report.transfer import percent_columns, transfer_rows
from geostream.runs.galleries import galleries
from geostream.runs.log import RunResult
from geostream.runs.run import Run
from geostream.training.field_of_view import WHOLE

QUERIES = 12  # that are shown with their best candidates
PROTOCOLS = {
    PAIRED: "Each query has one right answer, the tile of its own place.",
    NEAR: "Every tile within 5 m of where the query was taken is right, too: CVACT's own rule.",
    BOTH_WAYS: "Every picture of the query's place is right; AP is the average precision over all of them.",
}


def summarise(store: str, layout: Layout, result: RunResult) -> dict[str, Any]:
    """Return a run in numbers: what was trained on, how it went, what was read and where the time went.

    Args:
        store: URL of the store, as shown to people.
        layout: Layout that the run ended with.
        result: The run, read from its log.

    Returns:
        Plain values that can be written as JSON.
    """
    facts = ("pairs", "batches", "left_out", "hardness_score", "overlap", "resident_share")
    recalls = ("epoch", "r1", "r5", "r10", "r1pct", "hit_rate", "gallery")
    return {
        "store": store,
        "run": result.url,
        "dataset": {
            "name": layout.dataset,
            "layout": layout.name,
            "layout_id": layout.id,
            "places": layout.n_places,
            "pairs": len(layout.pairs("train").place),
            "test_pairs": len(layout.pairs("test").place),
            "bytes": int(layout.shard_sizes.sum()),
            "shards": len(layout.shard_names),
            "broken": len(layout.info["broken"]),
        },
        "evaluations": [{name: row[name] for name in recalls} for row in result.evaluations],
        "narrowed": _fields_of_view(result.evaluations),
        "datasets": [one["dataset"] for one in result.evaluations[-1].get("datasets", [])]
        if result.evaluations
        else [],
        "metres": [
            {"epoch": row["epoch"]} | ({"dataset": one["dataset"]} if "dataset" in one else {}) | one["metres"]
            for row in result.evaluations
            for one in row.get("datasets", [row])
            if one.get("metres")
        ],
        "protocols": [{"epoch": row["epoch"]} | one for row in result.evaluations for one in named_rows(row)],
        "plans": [{name: row.get(name) for name in ("epoch", "source", *facts)} for row in result.plans],
        "false_negatives": [_false_negatives(row) for row in result.minings if "dropped" in row],
        "reclusterings": list(result.reclusterings),
        "stream": dict(result.stream),
        "seconds": dict(result.seconds),
        "seconds_beside": dict(result.beside),
        "timeline": list(result.timeline),
    }


def publish(run: Run, result: RunResult, summary: Mapping[str, Any]) -> str:
    """Write ``report.html`` into the run.

    Args:
        run: The run, on the layout that it ended with.
        result: The run, read from its log.
        summary: The dict that :func:`summarise` returns.

    Returns:
        The page as HTML. It shows what the last evaluated weights retrieve and, where the run was compared with the
        current model, the result.

    Raises:
        BadInput: The run has no settings.
    """
    layout, pictures = run.layout, list[Retrieval]()
    if result.evaluations:
        on, epoch = galleries(run), int(result.evaluations[-1]["epoch"])
        for one in on:
            pictures += retrievals(one.layout, one.embeddings("test", epoch), count=max(1, QUERIES // len(on)))
    preview = preview_pairs(layout, run.settings)
    record = run.read_comparison()
    compared = None if record is None else comparison_section(layout, record)
    title = f"geostream: {layout.dataset} {layout.name}"
    suspicious = find_suspicious(run)
    shown = {**summary, "transfer": transfer_rows(run)}
    page = render_report(title, shown, result.training, pictures, preview, compared, suspicious, imagery=layout.source)
    run.write_report(page)
    return page


def render_report(
    title: str,
    summary: Mapping[str, Any],
    epochs: Rows,
    pictures: Sequence[Retrieval],
    preview: Sequence[PreviewPair],
    comparison: Mapping[str, Any] | None = None,
    suspicious: Suspicion | None = None,
    imagery: Mapping[str, Any] | None = None,
) -> str:
    """Return the report as HTML.

    Args:
        title: Title of the page.
        summary: The dict that :func:`summarise` returns; with ``transfer``, the rows of the table of that name
            (:mod:`geostream.report.transfer`), there is a section for it.
        epochs: The run's records of training.
        pictures: Queries with their best candidates. The section is left out if there are none.
        preview: Training pairs, plain and augmented. The section is left out if there are none.
        comparison: What :func:`~geostream.report.comparison.comparison_section` returns; None: no such section.
        suspicious: Training pairs to look at; None: no such section.
        imagery: Where the tiles come from, of :attr:`Layout.source`; None: it is not known.
    """
    evaluations, plans, moves = summary["evaluations"], summary["plans"], summary["reclusterings"]
    return render(
        "report.html",
        title=title,
        summary=summary,
        last=evaluations[-1] if evaluations else None,
        curves=curves_svg(epochs, evaluations, plans, moves),
        recall=_recall(summary["protocols"]),
        metres=_metres(summary["metres"]),
        narrowed=_narrowed(summary["narrowed"]),
        transfer=summary.get("transfer", []),
        transfer_percent=percent_columns(summary.get("transfer", [])),
        comparison=comparison,
        percent={*COLUMNS.values(), *(f"R@1 within {limit} m" for limit in WITHIN), "resident_share", "waiting"},
        retrievals=pictures,
        suspicious=suspicious,
        imagery=imagery,
        preview=preview_rows(preview),
        timeline=timeline_svg(summary["timeline"]),
        stages=[
            {"stage": stage, "trainer": round(value, 1), "beside it": round(summary["seconds_beside"].get(stage, 0), 1)}
            for stage, value in summary["seconds"].items()
        ],
        reads=[_reads(epoch) for epoch in epochs],
    )


def _recall(rows: Rows) -> list[dict[str, Any]]:
    """Group the rows of all epochs by data set, if there are several, protocol and direction."""
    labels = {"epoch": "epoch", **COLUMNS, "queries": "queries", "gallery": "gallery"}
    grouped, rules = dict[tuple[str, str], list[dict[str, Any]]](), dict[str, str]()
    for row in rows:
        shown = {label: row[name] for name, label in labels.items() if name in row}
        grouped.setdefault((row_name(row), row["direction"]), []).append(shown)
        rules[row_name(row)] = PROTOCOLS.get(row["protocol"], "")
    return [
        {"protocol": name, "direction": direction, "rule": rules[name], "rows": shown}
        for (name, direction), shown in grouped.items()
    ]


def _fields_of_view(evaluations: Rows) -> list[dict[str, Any]]:
    """Return the last evaluation's recall by degrees; nothing where it had whole views only."""
    last = evaluations[-1] if evaluations else {}
    if not last.get("narrowed"):
        return []
    shares = ("r1", "r5", "r10", "r1pct")
    return [{"fov": row.get("fov", WHOLE)} | {name: row[name] for name in shares} for row in (*last["narrowed"], last)]


def _narrowed(rows: Rows) -> list[dict[str, Any]]:
    """Return the rows of a table of what :func:`_fields_of_view` returned."""
    return [
        {"field of view": f"{row['fov']:g}°"} | {label: row[name] for name, label in COLUMNS.items() if name in row}
        for row in rows
    ]


def _metres(rows: Rows) -> list[dict[str, Any]]:
    """Return the figures on the ground by epoch: R@1 within some metres, and the median error."""
    return [
        {name: row[name] for name in ("epoch", "dataset") if name in row}
        | {f"R@1 within {limit} m": row[recall_name(1, limit)] for limit in WITHIN}
        | {"median error (m)": f"{row[MEDIAN]:,.1f}"}
        for row in rows
    ]


def _false_negatives(mining: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a mining dropped, by the column that shows it."""
    return {
        "mined after epoch": mining["epoch"],
        "margin": mining["search"]["positive_margin"],
        "candidates dropped": mining["dropped"],
        "places touched": mining["touched"],
        "of places": mining["places"],
        "lists made shorter": mining["short"],
        "lists left empty": mining["empty"],
    }


def _reads(epoch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what streaming cost in an epoch, by the column that shows it."""
    stream = epoch["stream"]
    return {
        "epoch": epoch["epoch"],
        "pairs/s": round(epoch["pairs_per_second"]),
        "waiting": epoch["wait_share"],
        "MB read": stream["bytes_fetched"] / 1e6,
        "read / used": stream["bytes_fetched"] / max(stream["bytes_used"], 1),
        "requests": stream["requests"],
        "MB a request": stream["merged_read_bytes"] / 1e6,
        "most MB held": stream["peak_resident_bytes"] / 1e6,
        "retries": sum(stream["retries"].values()),
        "replaced": stream["replaced_pairs"],
    }
