"""The report of a run: one HTML file with its curves, its tables and what the model retrieves.

Decides what a person sees first: the recall on unseen places, then how loss, recall and the hardness of the batches
went over the epochs, then test queries beside their five best tiles, the right one framed, and what training pairs look
like to the network. The file holds its pictures itself, so that it can be sent around; they cost about a megabyte.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from geostream.evaluation.metrics import named_rows
from geostream.evaluation.protocols import BOTH_WAYS, NEAR, PAIRED
from geostream.layout import Layout
from geostream.report.augmentations import SheetPair, sheet_pairs, sheet_section
from geostream.report.curves import Rows, curves_svg
from geostream.report.evaluation_page import COLUMNS
from geostream.report.retrievals import STYLE, Retrieval, retrieval_section, retrievals
from geostream.runs.log import RunResult
from geostream.runs.run import Run

PROTOCOLS = {
    PAIRED: "Each query has one right answer, the tile of its own place.",
    NEAR: "Every tile within 5 m of where the query was taken is right, too: CVACT's own rule.",
    BOTH_WAYS: "Every picture of the query's place is right; AP is the average precision over all of them.",
}


def summarise(store: str, layout: Layout, result: RunResult) -> dict[str, Any]:
    """A finished run in numbers: what was trained on, how it went, what was read and where the time went."""
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
        "protocols": [{"epoch": row["epoch"]} | one for row in result.evaluations for one in named_rows(row)],
        "plans": [{name: row.get(name) for name in ("epoch", "source", *facts)} for row in result.plans],
        "reclusterings": list(result.reclusterings),
        "stream": dict(result.stream),
        "seconds": dict(result.seconds),
    }


def publish(run: Run, result: RunResult, summary: Mapping[str, Any]) -> str:
    """Write ``report.html`` into the run, with what the last evaluated weights retrieve, and return it.

    Raises BadInput where the run's settings are missing.
    """
    layout, pictures = run.layout, list[Retrieval]()
    if result.evaluations:
        embeddings = run.embeddings("test", int(result.evaluations[-1]["epoch"]))
        pictures = retrievals(layout, embeddings)
    sheet = sheet_pairs(layout, run.settings)
    page = render_report(f"geostream: {layout.dataset} {layout.name}", summary, result.training, pictures, sheet)
    run.write_report(page)
    return page


def render_report(
    title: str,
    summary: Mapping[str, Any],
    epochs: Rows,
    pictures: Sequence[Retrieval],
    sheet: Sequence[SheetPair],
) -> str:
    """The report as HTML. ``summary``: of :func:`summarise`; ``epochs``: the run's training records."""
    evaluations, plans, moves = summary["evaluations"], summary["plans"], summary["reclusterings"]
    last = evaluations[-1] if evaluations else None
    # Without semi-positives it is R@1 again.
    hit = f", hit rate {last['hit_rate']:.1%}" if last and last["hit_rate"] != last["r1"] else ""
    head = (
        f"<p class=lead>R@1 <b>{last['r1']:.1%}</b> on a gallery of {last['gallery']:,} tiles of unseen places "
        f"(chance {1 / last['gallery']:.2%}){hit}, after {last['epoch']} epochs.</p>"
        if last
        else "<p class=lead>Not evaluated yet.</p>"
    )
    dataset = summary["dataset"]
    sections = [
        f"<h1>{html.escape(title)}</h1>{head}",
        f"<p>{dataset['places']:,} places, {dataset['pairs']:,} pairs, {dataset['bytes'] / 1e6:,.1f} MB in "
        f"{dataset['shards']} shards at <code>{html.escape(str(summary['store']))}</code>.</p>",
        "<h2>Training</h2>" + curves_svg(epochs, evaluations, plans, moves),
        "<h2>Recall on the test gallery</h2>" + _recall(summary["protocols"]),
        "<h2>Epoch plans</h2><p>Hardness score: 0 = random batches, 1 = Sample4Geo's assembly with random access to "
        "everything, on the same graph. Overlap: the largest share of a batch that came from one batch of the epoch "
        "before. Resident share: the most bytes held at once, of all.</p>" + _table(plans, ["resident_share"]),
        "<h2>Generations of the layout</h2><p>In geographic order look-alikes lie far apart, so that few of them are "
        "resident together, and a plan from a visual graph scores low. Then the shards are rewritten in the order of "
        "similarity, and training goes on from these. Before: what the old order allowed.</p>" + _table(moves, []),
    ]
    if pictures:
        sections.append(retrieval_section(pictures))
    if sheet:
        sections.append(sheet_section(sheet))
    seconds = [{"stage": stage, "seconds": round(value, 1)} for stage, value in summary["seconds"].items()]
    sections.append("<h2>Where the time went</h2>" + _table(seconds, []))
    sections.append(_reading(summary["stream"], epochs))
    return _PAGE.format(title=html.escape(title), style=STYLE, body="\n".join(sections))


def _recall(rows: Rows) -> str:
    """A table by epoch for each protocol and direction, under its name where there are several."""
    named: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        named.setdefault((row["protocol"], row["direction"]), []).append(row)
    parts = []
    for (protocol, direction), of_one in named.items():
        shares = [label for name, label in COLUMNS.items() if name in of_one[0]]
        names = {"epoch": "epoch", **COLUMNS, "queries": "queries", "gallery": "gallery"}
        if len(named) > 1:
            parts.append(f"<h3>{html.escape(protocol)}, {html.escape(direction)}</h3>")
        parts.append(f"<p>{html.escape(PROTOCOLS.get(protocol, ''))}</p>")
        parts.append(_table([{names[n]: row[n] for n in names if n in row} for row in of_one], shares))
    return "".join(parts) or _table([], [])


def _reading(stream: Mapping[str, Any], epochs: Rows) -> str:
    """What streaming cost, by epoch, and which pairs were replaced."""
    rows = [
        {
            "epoch": row["epoch"],
            "pairs/s": round(row["pairs_per_second"]),
            "waiting": row["wait_share"],
            "MB read": row["stream"]["bytes_fetched"] / 1e6,
            "read / used": row["stream"]["bytes_fetched"] / max(row["stream"]["bytes_used"], 1),
            "requests": row["stream"]["requests"],
            "MB a request": row["stream"]["merged_read_bytes"] / 1e6,
            "most MB held": row["stream"]["peak_resident_bytes"] / 1e6,
            "retries": sum(row["stream"]["retries"].values()),
            "replaced": row["stream"]["replaced_pairs"],
        }
        for row in epochs
    ]
    parts = [
        "<h2>What was read</h2><p>Waiting: the share of the time that training stood still for want of a batch. Read / "
        "used: bytes fetched over bytes of the images in the batches.</p>" + _table(rows, ["waiting"])
    ]
    if stream["retries"]:
        reasons = ", ".join(f"{html.escape(reason)} {count:,}" for reason, count in stream["retries"].items())
        parts.append(f"<p>Reads repeated, by reason: {reasons}.</p>")
    if stream["replaced"]:
        parts.append("<p>Pairs with a damaged image, and those that were trained in their place:</p>")
        parts.append(_table(stream["replaced"], []))
    return "".join(parts)


def _table(rows: Rows, percent: Sequence[str]) -> str:
    if not rows:
        return "<p>None.</p>"
    names = list(rows[0])
    head = "".join(f"<th>{html.escape(n)}</th>" for n in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(row.get(n), n in percent)}</td>" for n in names) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: object, percent: bool) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.1%}" if percent else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else html.escape(str(value))


_PAGE = """<!doctype html>
<html lang=en><head><meta charset=utf-8><title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; color: #222 }}
h1 {{ margin-bottom: 0 }} h2 {{ margin-top: 2.2rem }} .lead {{ font-size: 1.25rem }}
svg {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: right; border-bottom: 1px solid #eee }}
td:first-child, th:first-child {{ text-align: left }}
{style}</style></head><body>
{body}
</body></html>
"""
